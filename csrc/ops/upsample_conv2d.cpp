#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  m.def("upsample_conv2d(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor");
  // And mean and variance of y in each image's groups of channels, (B, groups, 2).
  m.def(
      "upsample_conv2d_moments(Tensor x, Tensor weight, Tensor? bias, str activation, int groups) -> (Tensor y, Tensor "
      "moments)");
  // CUDA: the weight as its kernels multiply by it, and the convolution, with its moments, by such a weight. Only the
  // caller knows whether it is still that of his weight.
  m.def("upsample_conv2d_pack_weight(Tensor weight) -> Tensor");
  m.def(
      "upsample_conv2d_packed(Tensor x, Tensor packed_weight, Tensor? bias, str activation, int cout, int groups) -> "
      "(Tensor y, Tensor moments)");
  // The gradients of x and weight for activation "linear".
  m.def("upsample_conv2d_backward_input(Tensor grad, Tensor weight) -> Tensor");
  m.def("upsample_conv2d_backward_weight(Tensor grad, Tensor x) -> Tensor");
}
