#include "ops/attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu_capability.h"
#include "common/memory.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void attention_kernel(const AttentionParams&))

namespace {

Tensor output_like(const Tensor& x) {
  Tensor t = empty_like_heads(x);
  advise_huge(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                         const std::optional<Tensor>& mask, bool causal, double scale) {
  check_attention(q_in, k_in, v_in, mask, scale);
  const Tensor q = with_unit_rows(q_in), k = with_unit_rows(k_in), v = with_unit_rows(v_in);
  Tensor out = output_like(q_in);
  Tensor lse = torch::stable::empty(std::vector{q.size(0), q.size(1), q.size(2)}, attention_lse_dtype(q), std::nullopt,
                                    q.device());
  const AttentionParams params = attention_params(q, k, v, mask, out, lse, causal, scale);
  if (out.numel() > 0) IMAGEGEN_PICK_KERNEL(attention_kernel, params.dtype)(params);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
}

}  // namespace imagegen
