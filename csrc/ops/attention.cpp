#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  // lse (B, H, Lq): the logarithm of each query's sum of exponentials, -inf where it attends to nothing.
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> (Tensor out, Tensor lse)");
  // dmask has mask's shape and dtype, or no elements unless mask_needs_grad.
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
      "bool causal, float scale, bool mask_needs_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)");
}
