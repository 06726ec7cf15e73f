#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  m.def(
      "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, "
      "str activation) -> (Tensor y, Tensor mean, Tensor rstd)");
  // With mean and variance of x's groups, (B, num_groups, 2), which are then not worked out from it.
  m.def(
      "group_norm_with_moments(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
      "Tensor? shift, str activation, Tensor moments) -> (Tensor y, Tensor mean, Tensor rstd)");
  // Per image and channel: group_norm without its activation is x * gain + offset.
  m.def(
      "group_norm_factors(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
      "Tensor? shift) -> (Tensor gain, Tensor offset)");
  // With z the argument of the activation and dz its gradient: the gradient of x, and per image and channel the sums
  // of dz and of dz times the normalised x, from which the gradients of weight, bias, scale and shift follow.
  m.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
      "Tensor? bias, Tensor? scale, Tensor? shift, str activation) -> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xhat)");
}
