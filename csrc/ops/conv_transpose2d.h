// conv_transpose2d: y = act((conv_transpose(x, weight) + bias) * scale + shift) for stride 2, padding 1 and a 4x4 or
// 3x3 kernel, and the two gradients of the convolution, which are linear in their inputs like it and so give each
// other's gradients.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/layout.h"

namespace imagegen {

// The height and width of the output for those of x.
struct ConvTranspose2dSize {
  int64_t kernel, extra_h, extra_w;  // extra: output_padding
  int64_t out_h(int64_t h) const { return 2 * h + kernel - 4 + extra_h; }
  int64_t out_w(int64_t w) const { return 2 * w + kernel - 4 + extra_w; }
};

inline ConvTranspose2dSize check_conv_transpose2d_size(const char* op, int64_t kernel,
                                                       const std::vector<int64_t>& output_padding) {
  IMAGEGEN_CHECK(output_padding.size() == 2, op, ": output_padding must be a pair of integers, got ",
                 output_padding.size());
  IMAGEGEN_CHECK(kernel == 3 || kernel == 4, op, ": the kernel must be 3x3 or 4x4, got ", kernel);
  for (const int64_t extra : output_padding) {
    IMAGEGEN_CHECK(extra >= 0, op, ": output_padding must be at least 0, got ", shape_string(output_padding));
    IMAGEGEN_CHECK(extra < 2, op, ": output_padding must be smaller than stride (2, 2), got ",
                   shape_string(output_padding));
  }
  return {kernel, output_padding[0], output_padding[1]};
}

inline void check_conv_transpose2d_weight(const char* op, const Tensor& weight) {
  IMAGEGEN_CHECK(weight.dim() == 4 && weight.size(2) > 0 && weight.size(3) > 0, op,
                 ": weight must have shape (C, Cout, kH, kW), got ", shape_string(weight));
  IMAGEGEN_CHECK(weight.size(2) == weight.size(3), op, ": the kernel must be 3x3 or 4x4, got weight ",
                 shape_string(weight));
}

inline ConvTranspose2dSize check_conv_transpose2d(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::vector<int64_t>& output_padding,
                                                  const std::optional<Tensor>& scale,
                                                  const std::optional<Tensor>& shift) {
  constexpr const char* op = "conv_transpose2d";
  check_dtype(op, "x", x);
  IMAGEGEN_CHECK(x.dim() == 4, op, ": x must have shape (B, C, H, W), got ", shape_string(x));
  check_same_device(op, "weight", weight, x);
  check_same_dtype(op, "weight", weight, x);
  check_conv_transpose2d_weight(op, weight);
  check_shape(op, "weight", weight, {x.size(1), weight.size(1), weight.size(2), weight.size(3)}, x);
  const auto check_channels = [&](const char* argument, const std::optional<Tensor>& t) {
    if (!t) return;
    check_same_device(op, argument, *t, x);
    if (argument[0] == 'b')
      check_same_dtype(op, argument, *t, x);
    else
      IMAGEGEN_CHECK(t->scalar_type() == x.scalar_type() || t->scalar_type() == ScalarType::Float, op, ": ", argument,
                     " must have x's dtype ", dtype_string(x.scalar_type()), " or torch.float32, got ",
                     dtype_string(t->scalar_type()));
    IMAGEGEN_CHECK(t->dim() == 1 && t->size(0) == weight.size(1), op, ": ", argument, " must have shape (",
                   weight.size(1), ",) to match weight ", shape_string(weight), ", got ", shape_string(*t));
  };
  check_channels("bias", bias);
  check_channels("scale", scale);
  check_channels("shift", shift);
  const ConvTranspose2dSize size = check_conv_transpose2d_size(op, weight.size(2), output_padding);
  IMAGEGEN_CHECK(size.out_h(x.size(2)) >= 0 && size.out_w(x.size(3)) >= 0, op, ": padding must leave something of x ",
                 shape_string(x), " under weight ", shape_string(weight), ", got (1, 1)");
  return size;
}

// grad of shape (B, Cout, OH, OW) against weight, for the gradient of x; returns the shape of that.
inline std::vector<int64_t> check_conv_transpose2d_backward_input(const Tensor& grad, const Tensor& weight,
                                                                  const std::vector<int64_t>& output_padding) {
  constexpr const char* op = "conv_transpose2d_backward_input";
  check_dtype(op, "grad", grad);
  check_same_device(op, "weight", weight, grad);
  check_same_dtype(op, "weight", weight, grad);
  check_conv_transpose2d_weight(op, weight);
  const ConvTranspose2dSize size = check_conv_transpose2d_size(op, weight.size(2), output_padding);
  IMAGEGEN_CHECK(grad.dim() == 4 && grad.size(1) == weight.size(1), op, ": grad must have shape (B, ", weight.size(1),
                 ", OH, OW), got ", shape_string(grad));
  const int64_t h = (grad.size(2) - size.out_h(0)) / 2, w = (grad.size(3) - size.out_w(0)) / 2;
  IMAGEGEN_CHECK(size.out_h(h) == grad.size(2) && size.out_w(w) == grad.size(3), op, ": grad of shape ",
                 shape_string(grad), " is no output of weight ", shape_string(weight), " with output_padding ",
                 shape_string(output_padding));
  return {grad.size(0), weight.size(0), h, w};
}

// grad of shape (B, Cout, OH, OW) against x, for the gradient of weight.
inline void check_conv_transpose2d_backward_weight(const Tensor& grad, const Tensor& x, int64_t kernel,
                                                   const std::vector<int64_t>& output_padding) {
  constexpr const char* op = "conv_transpose2d_backward_weight";
  check_dtype(op, "x", x);
  check_same_device(op, "grad", grad, x);
  check_same_dtype(op, "grad", grad, x);
  IMAGEGEN_CHECK(x.dim() == 4, op, ": x must have shape (B, C, H, W), got ", shape_string(x));
  const ConvTranspose2dSize size = check_conv_transpose2d_size(op, kernel, output_padding);
  const int64_t h = size.out_h(x.size(2)), w = size.out_w(x.size(3));
  IMAGEGEN_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(2) == h && grad.size(3) == w, op,
                 ": grad must have shape (", x.size(0), ", Cout, ", h, ", ", w, ") to match x ", shape_string(x),
                 ", got ", shape_string(grad));
}

}  // namespace imagegen
