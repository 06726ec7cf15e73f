#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  // norm (D), cos and sin (..., L, D/2) in the type sums are kept in; halves: the pairs are (i, i + D/2).
  m.def("attention_rows(Tensor x, Tensor? norm, Tensor? cos, Tensor? sin, float eps, bool halves) -> Tensor");
  // dnorm has no elements without a norm.
  m.def(
      "attention_rows_backward(Tensor grad, Tensor x, Tensor? norm, Tensor? cos, Tensor? sin, float eps, bool halves) "
      "-> (Tensor dx, Tensor dnorm)");
  // attention(attention_rows(q, q_norm, ...), attention_rows(k, k_norm, ...), v, ...) without those tensors in memory.
  m.def(
      "attention_over_rows(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? q_norm, Tensor? k_norm, Tensor? cos, "
      "Tensor? sin, float eps, bool halves, bool causal, float scale) -> (Tensor out, Tensor lse)");
}
