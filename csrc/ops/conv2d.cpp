#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, "
      "str input_activation, str activation) -> Tensor");
  // With nothing but a bias, and the gradients of that in x and weight.
  m.def("conv2d_plain(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("conv2d_backward_input(Tensor grad, Tensor weight) -> Tensor");
  m.def("conv2d_backward_weight(Tensor grad, Tensor x) -> Tensor");
}
