// conv2d: y = act(conv3x3(input_activation(x * scale + shift), weight) + bias + residual), and the two gradients of
// conv3x3, which are linear in their inputs like it and so give each other's gradients.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"

namespace imagegen {

inline void check_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& residual, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift) {
  constexpr const char* op = "conv2d";
  const int64_t cout = check_conv3x3(op, x, weight, bias);
  if (residual) {
    check_same_device(op, "residual", *residual, x);
    check_same_dtype(op, "residual", *residual, x);
    check_shape(op, "residual", *residual, {x.size(0), cout, x.size(2), x.size(3)}, x);
  }
  IMAGEGEN_CHECK(scale.has_value() == shift.has_value(), op, ": scale and shift must be given together, got only ",
                 scale ? "scale" : "shift");
  const std::pair<const char*, const std::optional<Tensor>&> factors[] = {{"scale", scale}, {"shift", shift}};
  for (const auto& [argument, t] : factors)
    if (t) {
      check_same_device(op, argument, *t, x);
      IMAGEGEN_CHECK(t->scalar_type() == x.scalar_type() || t->scalar_type() == ScalarType::Float, op, ": ", argument,
                     " must have x's dtype ", dtype_string(x.scalar_type()), " or torch.float32, got ",
                     dtype_string(t->scalar_type()));
      check_shape(op, argument, *t, {x.size(0), x.size(1)}, x);
    }
}

// grad of shape (B, Cout, H, W) against weight, for the gradient of x.
inline void check_conv2d_backward_input(const Tensor& grad, const Tensor& weight) {
  constexpr const char* op = "conv2d_backward_input";
  check_dtype(op, "grad", grad);
  check_same_device(op, "weight", weight, grad);
  check_same_dtype(op, "weight", weight, grad);
  IMAGEGEN_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, op,
                 ": weight must have shape (Cout, C, 3, 3), got ", shape_string(weight));
  IMAGEGEN_CHECK(grad.dim() == 4 && grad.size(1) == weight.size(0), op, ": grad must have shape (B, ", weight.size(0),
                 ", H, W), got ", shape_string(grad));
}

// grad of shape (B, Cout, H, W) against x, for the gradient of weight.
inline void check_conv2d_backward_weight(const Tensor& grad, const Tensor& x) {
  constexpr const char* op = "conv2d_backward_weight";
  check_dtype(op, "x", x);
  check_same_device(op, "grad", grad, x);
  check_same_dtype(op, "grad", grad, x);
  IMAGEGEN_CHECK(x.dim() == 4, op, ": x must have shape (B, C, H, W), got ", shape_string(x));
  IMAGEGEN_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                 op, ": grad must have shape (", x.size(0), ", Cout, ", x.size(2), ", ", x.size(3), ") to match x ",
                 shape_string(x), ", got ", shape_string(grad));
}

}  // namespace imagegen
