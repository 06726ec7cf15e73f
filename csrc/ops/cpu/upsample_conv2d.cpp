#include "ops/upsample_conv2d.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/fingerprint.h"
#include "common/memory.h"
#include "common/product_conv.h"
#include "common/product_conv_weight.h"
#include "common/weight_cache.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_kernel(const ProductConvParams&))
IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_few_kernel(const ProductConvParams&, const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_backward_input_kernel(const ProductConvParams&))
IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_backward_weight_kernel(const ProductConvWeightParams&))
// Return the bytes of the packed weight, and make it where params.u is given.
IMAGEGEN_DECLARE_KERNEL(int64_t upsample_conv2d_pack_kernel(const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(int64_t upsample_conv2d_backward_input_pack_kernel(const PackWeightParams&))

namespace {

constexpr int64_t kFewChannels = 4;

void copy_strides(const Tensor& t, int64_t (&stride)[4]) {
  for (int d = 0; d < 4; ++d) stride[d] = t.stride(d);
}

PackWeightParams weight_params(const Tensor& weight, Dtype dtype) {
  PackWeightParams p{};
  p.w = weight.const_data_ptr();
  p.dtype = dtype;
  copy_strides(weight, p.w_stride);
  p.cout = weight.size(0), p.cin = weight.size(1);
  return p;
}

// The weight as the forward (or the transpose) multiplies by it.
std::shared_ptr<PackedWeight> packed(const Tensor& weight_in, Dtype dtype, bool transpose) {
  // Packing reads a weight of any strides, but the fingerprint reads memory from end to end.
  const bool dense = weight_in.is_contiguous() || is_channels_last(weight_in);
  const Tensor weight = dense ? weight_in : torch::stable::contiguous(weight_in);
  PackWeightParams params = weight_params(weight, dtype);
  WeightKey key{params.w, params.cout, params.cin, {}, static_cast<int>(dtype), static_cast<int>(cpu_capability()),
                transpose};
  copy_strides(weight, key.stride);
  if (transpose) std::swap(params.cout, params.cin), std::swap(params.w_stride[0], params.w_stride[1]);
  const auto pack = [&](void* u) {
    params.u = u;
    return transpose ? IMAGEGEN_PICK_KERNEL(upsample_conv2d_backward_input_pack_kernel, dtype)(params)
                     : IMAGEGEN_PICK_KERNEL(upsample_conv2d_pack_kernel, dtype)(params);
  };
  const int64_t bytes = pack(nullptr);
  if (!dense) {  // a copy made for this call: nothing will ask for it again
    auto once = std::make_shared<PackedWeight>(bytes);
    pack(once->data);
    return once;
  }
  const uint64_t fingerprint =
      IMAGEGEN_PICK_KERNEL(fingerprint_kernel, dtype)(params.w, weight.numel() * weight.element_size());
  return packed_weight(key, fingerprint, bytes, pack);
}

ProductConvParams conv_params(const Tensor& x, Dtype dtype, const Tensor& y) {
  ProductConvParams p{};
  p.x = x.const_data_ptr();
  copy_strides(x, p.x_stride);
  p.dtype = dtype;
  p.y = y.mutable_data_ptr();
  p.y_channels_last = is_channels_last(y);
  p.batch = x.size(0), p.cin = x.size(1), p.in_h = x.size(2), p.in_w = x.size(3);
  p.cout = y.size(1), p.out_h = y.size(2), p.out_w = y.size(3);
  advise_huge(p.y, y.numel() * y.element_size());
  return p;
}

Tensor upsample_conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in,
                           const std::string& activation) {
  const UpsampleConv2dShape s = check_upsample_conv2d(x, weight, bias_in);
  const Activation act = check_activation("upsample_conv2d", "activation", activation);
  const Dtype dtype = check_dtype("upsample_conv2d", "x", x);
  Tensor y = new_empty_4d(x, {s.batch, s.cout, 2 * s.height, 2 * s.width}, is_channels_last(x));
  if (y.numel() == 0) return y;
  ProductConvParams p = conv_params(x, dtype, y);
  const std::optional<Tensor> bias = bias_in ? std::optional(torch::stable::contiguous(*bias_in)) : std::nullopt;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.activation = act;
  if (s.cout <= kFewChannels) {
    IMAGEGEN_PICK_KERNEL(upsample_conv2d_few_kernel, dtype)(p, weight_params(weight, dtype));
    return y;
  }
  const auto u = packed(weight, dtype, false);
  p.u = u->data;
  IMAGEGEN_PICK_KERNEL(upsample_conv2d_kernel, dtype)(p);
  return y;
}

Tensor upsample_conv2d_backward_input_cpu(const Tensor& grad, const Tensor& weight) {
  const UpsampleConv2dShape s = check_upsample_conv2d_backward_input(grad, weight);
  const Dtype dtype = check_dtype("upsample_conv2d_backward_input", "grad", grad);
  Tensor y = new_empty_4d(grad, {s.batch, s.cin, s.height, s.width}, is_channels_last(grad));
  if (y.numel() == 0) return y;
  ProductConvParams p = conv_params(grad, dtype, y);
  p.activation = Activation::linear;
  const auto u = packed(weight, dtype, true);
  p.u = u->data;
  IMAGEGEN_PICK_KERNEL(upsample_conv2d_backward_input_kernel, dtype)(p);
  return y;
}

Tensor upsample_conv2d_backward_weight_cpu(const Tensor& grad, const Tensor& x) {
  const UpsampleConv2dShape s = check_upsample_conv2d_backward_weight(grad, x);
  Tensor y = new_empty_4d(x, {s.cout, s.cin, 3, 3}, false);
  if (y.numel() == 0) return y;
  ProductConvWeightParams p{};
  p.x = x.const_data_ptr(), p.grad = grad.const_data_ptr(), p.y = y.mutable_data_ptr();
  copy_strides(x, p.x_stride), copy_strides(grad, p.grad_stride);
  p.dtype = check_dtype("upsample_conv2d_backward_weight", "x", x);
  p.batch = s.batch, p.cin = s.cin, p.cout = s.cout;
  p.in_h = s.height, p.in_w = s.width, p.out_h = 2 * s.height, p.out_w = 2 * s.width;
  IMAGEGEN_PICK_KERNEL(upsample_conv2d_backward_weight_kernel, p.dtype)(p);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("upsample_conv2d", TORCH_BOX(&upsample_conv2d_cpu));
  m.impl("upsample_conv2d_backward_input", TORCH_BOX(&upsample_conv2d_backward_input_cpu));
  m.impl("upsample_conv2d_backward_weight", TORCH_BOX(&upsample_conv2d_backward_weight_cpu));
}

}  // namespace imagegen
