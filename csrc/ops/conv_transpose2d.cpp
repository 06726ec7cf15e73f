#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  // Of stride 2 and padding 1, with a 4x4 or 3x3 kernel.
  m.def(
      "conv_transpose2d(Tensor x, Tensor weight, Tensor? bias, int[] output_padding, Tensor? scale, Tensor? shift, "
      "str activation) -> Tensor");
  // The gradients of x and weight where there is nothing but the convolution.
  m.def("conv_transpose2d_backward_input(Tensor grad, Tensor weight, int[] output_padding) -> Tensor");
  m.def("conv_transpose2d_backward_weight(Tensor grad, Tensor x, int kernel, int[] output_padding) -> Tensor");
}
