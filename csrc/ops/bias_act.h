// bias_act: y = clamp(gain * act(x + b)), elementwise over tensors of any strides.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/scalar.h"

namespace imagegen {

constexpr int kBiasActMaxDims = 8;

struct BiasActParams {
  const void* x;     // [size]
  const void* b;     // [C] or null
  const void* grad;  // [size] for the backward, else null
  void* y;           // [size]: the output, or the gradient of x
  Dtype dtype;
  Activation act;
  double alpha, gain, clamp;  // clamp: infinity for none
  int dims;                   // at least 1, outermost first, the last one innermost in y's memory
  int64_t size[kBiasActMaxDims];
  int64_t x_stride[kBiasActMaxDims], grad_stride[kBiasActMaxDims], y_stride[kBiasActMaxDims];
  int64_t b_stride[kBiasActMaxDims];  // zero but for the bias's axis
};

}  // namespace imagegen

#ifdef TORCH_STABLE_ONLY  // the host's half: kernel files see no torch
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "common/check.h"

namespace imagegen {

inline BiasActParams bias_act_params(const Tensor& x, const std::optional<Tensor>& b, const std::optional<Tensor>& grad,
                                     const Tensor& y, int64_t dim, const std::string& act, double alpha, double gain,
                                     std::optional<double> clamp) {
  BiasActParams p{};
  p.dtype = check_dtype("bias_act", "x", x);
  IMAGEGEN_CHECK(x.dim() <= kBiasActMaxDims, "bias_act: x must have at most 8 dimensions, got ", x.dim());
  IMAGEGEN_CHECK(-x.dim() <= dim && dim < x.dim(), "bias_act: dim must be an axis of x ", shape_string(x), ", got ",
                 dim);
  dim = dim < 0 ? dim + x.dim() : dim;
  if (b) {
    check_same_device("bias_act", "b", *b, x);
    check_same_dtype("bias_act", "b", *b, x);
    check_shape("bias_act", "b", *b, {x.size(dim)}, x);
  }
  if (grad) {
    check_same_device("bias_act", "grad", *grad, x);
    check_same_dtype("bias_act", "grad", *grad, x);
    check_shape("bias_act", "grad", *grad, shape_of(x), x);
  }
  p.act = check_activation("bias_act", "act", act);
  IMAGEGEN_CHECK(!clamp || *clamp >= 0, "bias_act: clamp must be at least 0, got ", *clamp);
  p.x = x.const_data_ptr();
  p.b = b ? b->const_data_ptr() : nullptr;
  p.grad = grad ? grad->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.alpha = alpha;
  p.gain = gain;
  p.clamp = clamp ? *clamp : std::numeric_limits<double>::infinity();

  // Axes from outermost to innermost in y's memory; neighbours that every tensor steps through alike become one.
  std::vector<int64_t> axes(x.dim());
  std::iota(axes.begin(), axes.end(), 0);
  std::stable_sort(axes.begin(), axes.end(), [&](int64_t i, int64_t j) { return y.stride(i) > y.stride(j); });
  for (int64_t a : axes) {
    if (x.size(a) == 1 && p.dims > 0) continue;
    const int64_t n = x.size(a), x_s = x.stride(a), y_s = y.stride(a), g_s = grad ? grad->stride(a) : 0;
    const int64_t b_s = b && a == dim ? b->stride(0) : 0;
    const int o = p.dims - 1;
    if (o >= 0 && (p.size[o] == 1 || (p.x_stride[o] == n * x_s && p.y_stride[o] == n * y_s &&
                                      p.grad_stride[o] == n * g_s && p.b_stride[o] == n * b_s))) {
      p.size[o] *= n;
      p.x_stride[o] = x_s, p.y_stride[o] = y_s, p.grad_stride[o] = g_s, p.b_stride[o] = b_s;
    } else {
      const int d = p.dims++;
      p.size[d] = n, p.x_stride[d] = x_s, p.y_stride[d] = y_s, p.grad_stride[d] = g_s, p.b_stride[d] = b_s;
    }
  }
  return p;
}

}  // namespace imagegen
#endif
