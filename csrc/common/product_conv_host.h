// What the hosts of the convolutions by products share: parameters read off tensors, and packed weights from the cache.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <utility>

#include "cpu_capability.h"
#include "fingerprint.h"
#include "layout.h"
#include "product_conv.h"
#include "product_conv_weight.h"
#include "weight_cache.h"

namespace imagegen {

inline void copy_strides(const torch::stable::Tensor& t, int64_t (&stride)[4]) {
  for (int d = 0; d < 4; ++d) stride[d] = t.stride(d);
}

// t itself where it is contiguous already: asking torch takes 1 us.
inline std::optional<torch::stable::Tensor> contiguous(const std::optional<torch::stable::Tensor>& t) {
  return !t || t->is_contiguous() ? t : torch::stable::contiguous(*t);
}

inline std::optional<torch::stable::Tensor> in_compute_type(const std::optional<torch::stable::Tensor>& t,
                                                            Dtype dtype) {
  using torch::headeronly::ScalarType;
  const ScalarType type = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  return contiguous(!t || t->scalar_type() == type ? t : torch::stable::to(*t, type));
}

inline const void* data_of(const std::optional<torch::stable::Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

inline ProductConvParams product_conv_params(const torch::stable::Tensor& x, Dtype dtype, torch::stable::Tensor& y) {
  ProductConvParams p{};
  p.x = x.const_data_ptr();
  copy_strides(x, p.x_stride);
  p.dtype = dtype;
  p.y = y.mutable_data_ptr();
  p.y_channels_last = is_channels_last(y);
  p.batch = x.size(0), p.cin = x.size(1), p.in_h = x.size(2), p.in_w = x.size(3);
  p.cout = y.size(1), p.out_h = y.size(2), p.out_w = y.size(3);
  return p;
}

// y is the gradient of a weight (cout, cin, 3, 3).
inline ProductConvWeightParams product_conv_weight_params(const torch::stable::Tensor& x,
                                                          const torch::stable::Tensor& grad, Dtype dtype,
                                                          torch::stable::Tensor& y) {
  ProductConvWeightParams p{};
  p.x = x.const_data_ptr(), p.grad = grad.const_data_ptr(), p.y = y.mutable_data_ptr();
  copy_strides(x, p.x_stride), copy_strides(grad, p.grad_stride);
  p.dtype = dtype;
  p.batch = x.size(0), p.cin = x.size(1), p.cout = grad.size(1);
  p.in_h = x.size(2), p.in_w = x.size(3), p.out_h = grad.size(2), p.out_w = grad.size(3);
  return p;
}

inline PackWeightParams pack_weight_params(const torch::stable::Tensor& weight, Dtype dtype) {
  PackWeightParams p{};
  p.w = weight.const_data_ptr();
  p.dtype = dtype;
  copy_strides(weight, p.w_stride);
  p.cout = weight.size(0), p.cin = weight.size(1);
  return p;
}

// How an algorithm looks at the weight.
inline PackWeightParams as_it_is(PackWeightParams p) {
  return p;
}
inline PackWeightParams transposed(PackWeightParams p) {
  std::swap(p.cout, p.cin), std::swap(p.w_stride[0], p.w_stride[1]);
  return p;
}

// The weight as an algorithm multiplies by it. pack(params) returns its bytes, and makes it where params.u is given.
template <class View, class Pack>
std::shared_ptr<PackedWeight> packed_weight(const char* algorithm, const torch::stable::Tensor& weight_in, Dtype dtype,
                                            const View& view, const Pack& pack) {
  // Packing reads a weight of any strides, but the fingerprint reads memory from end to end.
  const bool dense = weight_in.is_contiguous() || is_channels_last(weight_in);
  const torch::stable::Tensor weight = dense ? weight_in : torch::stable::contiguous(weight_in);
  PackWeightParams params = view(pack_weight_params(weight, dtype));
  const auto pack_into = [&](void* u) {
    params.u = u;
    return pack(params);
  };
  const int64_t bytes = pack_into(nullptr);
  if (!dense) {  // a copy made for this call: nothing will ask for it again
    auto once = std::make_shared<PackedWeight>(bytes);
    pack_into(once->data);
    return once;
  }
  WeightKey key{params.w, params.cout, params.cin, {}, static_cast<int>(dtype), static_cast<int>(cpu_capability()),
                algorithm};
  for (int d = 0; d < 4; ++d) key.stride[d] = params.w_stride[d];
  const uint64_t fingerprint =
      IMAGEGEN_PICK_KERNEL(fingerprint_kernel, dtype)(weight.const_data_ptr(), weight.numel() * weight.element_size());
  return packed_weight(key, fingerprint, bytes, pack_into);
}

}  // namespace imagegen
