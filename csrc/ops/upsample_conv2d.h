// upsample_conv2d: y = act(conv3x3(nearest2x(x), weight) + bias), and the two gradients, which are linear in their
// inputs like it and so give each other's gradients.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/layout.h"

namespace imagegen {

// (B, C, H, W) of x and the number of output channels.
struct UpsampleConv2dShape {
  int64_t batch, cin, height, width, cout;
};

inline UpsampleConv2dShape check_upsample_conv2d(const Tensor& x, const Tensor& weight,
                                                 const std::optional<Tensor>& bias) {
  const int64_t cout = check_conv3x3("upsample_conv2d", x, weight, bias);
  return {x.size(0), x.size(1), x.size(2), x.size(3), cout};
}

inline void check_upsample_conv2d_groups(int64_t groups, int64_t cout) {
  IMAGEGEN_CHECK(groups >= 1 && cout % groups == 0,
                 "upsample_conv2d: moments must be a number of groups that divides weight's ", cout,
                 " output channels, got ", groups);
}

inline void check_upsample_conv2d_weight(const char* op, const Tensor& weight) {
  check_dtype(op, "weight", weight);
  IMAGEGEN_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, op,
                 ": weight must have shape (Cout, C, 3, 3), got ", shape_string(weight));
}

inline UpsampleConv2dShape check_upsample_conv2d_packed(const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias, int64_t cout) {
  constexpr const char* op = "upsample_conv2d";
  check_dtype(op, "x", x);
  IMAGEGEN_CHECK(x.dim() == 4, op, ": x must have shape (B, C, H, W), got ", shape_string(x));
  check_same_device(op, "packed_weight", weight, x);
  check_same_dtype(op, "packed_weight", weight, x);
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_same_dtype(op, "bias", *bias, x);
    IMAGEGEN_CHECK(bias->dim() == 1 && bias->size(0) == cout, op, ": bias must have shape (", cout,
                   ",) to match packed_weight, got ", shape_string(*bias));
  }
  return {x.size(0), x.size(1), x.size(2), x.size(3), cout};
}

// grad of shape (B, Cout, 2H, 2W) against weight, for the gradient of x.
inline UpsampleConv2dShape check_upsample_conv2d_backward_input(const Tensor& grad, const Tensor& weight) {
  constexpr const char* op = "upsample_conv2d_backward_input";
  check_dtype(op, "grad", grad);
  check_same_device(op, "weight", weight, grad);
  check_same_dtype(op, "weight", weight, grad);
  check_upsample_conv2d_weight(op, weight);
  IMAGEGEN_CHECK(grad.dim() == 4 && grad.size(1) == weight.size(0) && grad.size(2) % 2 == 0 && grad.size(3) % 2 == 0,
                 op, ": grad must have shape (B, ", weight.size(0), ", 2H, 2W), got ", shape_string(grad));
  return {grad.size(0), weight.size(1), grad.size(2) / 2, grad.size(3) / 2, weight.size(0)};
}

// grad of shape (B, Cout, 2H, 2W) against x, for the gradient of weight.
inline UpsampleConv2dShape check_upsample_conv2d_backward_weight(const Tensor& grad, const Tensor& x) {
  constexpr const char* op = "upsample_conv2d_backward_weight";
  check_dtype(op, "x", x);
  check_same_device(op, "grad", grad, x);
  check_same_dtype(op, "grad", grad, x);
  IMAGEGEN_CHECK(x.dim() == 4, op, ": x must have shape (B, C, H, W), got ", shape_string(x));
  IMAGEGEN_CHECK(
      grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(2) == 2 * x.size(2) && grad.size(3) == 2 * x.size(3),
      op, ": grad must have shape (", x.size(0), ", Cout, ", 2 * x.size(2), ", ", 2 * x.size(3), ") to match x ",
      shape_string(x), ", got ", shape_string(grad));
  return {x.size(0), x.size(1), x.size(2), x.size(3), grad.size(1)};
}

}  // namespace imagegen
