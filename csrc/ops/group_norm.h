// group_norm: y = act(gn(x) * (1 + scale) + shift), and its gradient.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/scalar.h"

namespace imagegen {

constexpr int kGroupNormMaxDims = 8;  // spatial axes

// Weight, bias, scale or shift: one value per channel, or per image and channel.
struct GroupNormFactor {
  const void* p;  // null where absent
  Dtype dtype;
  int64_t batch_stride, c_stride;
};

struct GroupNormParams {
  const void* x;        // [B, C, size...]
  const void* grad;     // [B, C, size...] for the backward
  void* y;              // [B, C, size...]: the output, or the gradient of x; null where only the factors are asked for
  const void* moments;  // [B, groups, 2] of x where they are known to the forward: mean and variance; else null
  void* mean;           // [B, groups], written by the forward and read by the backward; float, double for double x
  void* rstd;           // [B, groups]
  void* gain;           // [B, C] for the factors: without its activation the output is x * gain + offset
  void* offset;
  void* sum_dz;  // [B, C] for the backward: sums over pixels of dz, and of dz times the normalised x
  void* sum_dz_xhat;
  GroupNormFactor weight, bias, scale, shift;
  Dtype dtype;
  Activation activation;
  double eps;
  bool backward;
  bool channels_innermost;  // in y, and then in x and grad too; otherwise their innermost pixels are neighbours
  int64_t batch, channels, groups, pixels;
  int64_t x_batch_stride, x_c_stride, grad_batch_stride, grad_c_stride;
  int dims;  // of the pixels: at least 1, outermost first; y steps through them without a gap
  int64_t size[kGroupNormMaxDims], x_stride[kGroupNormMaxDims], grad_stride[kGroupNormMaxDims];
};

}  // namespace imagegen

#ifdef TORCH_STABLE_ONLY  // the host's half: kernel files see no torch
#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace imagegen {

inline GroupNormFactor group_norm_factor(const char* argument, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t) return {};
  const bool per_image = argument[0] == 's';  // scale and shift
  IMAGEGEN_CHECK(t->scalar_type() == x.scalar_type() || t->scalar_type() == ScalarType::Float, "group_norm: ", argument,
                 " must have x's dtype ", dtype_string(x.scalar_type()), " or torch.float32, got ",
                 dtype_string(t->scalar_type()));
  check_same_device("group_norm", argument, *t, x);
  const int64_t batch = x.size(0), channels = x.size(1);
  check_shape("group_norm", argument, *t, per_image ? std::vector{batch, channels} : std::vector{channels}, x);
  return {t->const_data_ptr(), check_dtype("group_norm", argument, *t), per_image ? t->stride(0) : 0,
          t->stride(per_image ? 1 : 0)};
}

inline void check_group_norm(const Tensor& x, int64_t num_groups, double eps) {
  check_dtype("group_norm", "x", x);
  IMAGEGEN_CHECK(2 <= x.dim() && x.dim() <= kGroupNormMaxDims + 2,
                 "group_norm: x must have shape (B, C, ...) of at most 10 axes, got ", shape_string(x));
  IMAGEGEN_CHECK(num_groups >= 1 && x.size(1) % num_groups == 0, "group_norm: num_groups must divide x's ", x.size(1),
                 " channels, got ", num_groups);
  IMAGEGEN_CHECK(eps >= 0, "group_norm: eps must be at least 0, got ", eps);
}

// Whether the kernel can walk t as it is: along the channels, or along the innermost pixels.
inline bool group_norm_walks(const Tensor& t, bool channels_innermost) {
  if (channels_innermost) return t.size(1) == 1 || t.stride(1) == 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d)
    if (t.size(d) != 1) return t.stride(d) == 1;
  return true;
}

// x and grad walk; y is contiguous or, where `channels_last`, that.
inline GroupNormParams group_norm_params(const Tensor& x, const std::optional<Tensor>& grad,
                                         const std::optional<Tensor>& y, bool channels_last, int64_t num_groups,
                                         const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                         double eps, const std::optional<Tensor>& scale,
                                         const std::optional<Tensor>& shift, const std::string& activation) {
  GroupNormParams p{};
  p.dtype = check_dtype("group_norm", "x", x);
  p.weight = group_norm_factor("weight", weight, x);
  p.bias = group_norm_factor("bias", bias, x);
  p.scale = group_norm_factor("scale", scale, x);
  p.shift = group_norm_factor("shift", shift, x);
  p.activation = check_activation("group_norm", "activation", activation);
  p.eps = eps;
  p.backward = grad.has_value();
  p.x = x.const_data_ptr();
  p.grad = grad ? grad->const_data_ptr() : nullptr;
  p.y = y ? y->mutable_data_ptr() : nullptr;
  p.batch = x.size(0), p.channels = x.size(1), p.groups = num_groups, p.pixels = 1;
  p.x_batch_stride = x.stride(0), p.x_c_stride = x.stride(1);
  if (grad) p.grad_batch_stride = grad->stride(0), p.grad_c_stride = grad->stride(1);

  // Neighbouring axes that every tensor steps through alike become one.
  p.dims = 1, p.size[0] = 1, p.x_stride[0] = 1, p.grad_stride[0] = 1;
  for (int64_t d = 2; d < x.dim(); ++d) {
    const int64_t n = x.size(d), x_s = x.stride(d), g_s = grad ? grad->stride(d) : 0;
    p.pixels *= n;
    if (n == 1) continue;
    int o = p.dims - 1;
    const bool merge = p.size[o] == 1 || (p.x_stride[o] == n * x_s && (!grad || p.grad_stride[o] == n * g_s));
    if (!merge) o = p.dims++, p.size[o] = 1;
    p.size[o] *= n, p.x_stride[o] = x_s, p.grad_stride[o] = g_s;
  }
  p.channels_innermost = channels_last || p.pixels == 1;
  return p;
}

}  // namespace imagegen
#endif
