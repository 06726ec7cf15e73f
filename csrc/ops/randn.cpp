#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  // An int32 out takes the bits that normals are made of.
  m.def("randn(Tensor(a!) out, int seed, int step, int stream, int first) -> ()");
}
