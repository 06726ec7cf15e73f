#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_backward.h"
#include "common/cpu_capability.h"
#include "common/output_cache.h"
#include "ops/attention_rows.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void attention_kernel(const AttentionParams&, const AttentionRows& q, const AttentionRows& k))
// dq_parts: memory for the sums of dq of each of attention_backward_parts, where there are several.
IMAGEGEN_DECLARE_KERNEL(void attention_backward_kernel(const AttentionParams&, void* dq_parts))

namespace {

Tensor output_like(const Tensor& x) {
  return in_kept_memory(empty_like_heads(x));
}

std::tuple<Tensor, Tensor> run(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                               const std::optional<Tensor>& mask, const AttentionRows& q_rows,
                               const AttentionRows& k_rows, bool causal, double scale) {
  const Tensor q = with_unit_rows(q_in), k = with_unit_rows(k_in), v = with_unit_rows(v_in);
  Tensor out = output_like(q_in);
  Tensor lse = torch::stable::empty(std::vector{q.size(0), q.size(1), q.size(2)}, attention_lse_dtype(q), std::nullopt,
                                    q.device());
  const AttentionParams params = attention_params(q, k, v, mask, out, lse, causal, scale);
  if (out.numel() > 0) IMAGEGEN_PICK_KERNEL(attention_kernel, params.dtype)(params, q_rows, k_rows);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& mask, bool causal, double scale) {
  check_attention(q, k, v, mask, scale);
  return run(q, k, v, mask, {}, {}, causal, scale);
}

std::tuple<Tensor, Tensor> attention_over_rows_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& q_norm_in, const std::optional<Tensor>& k_norm_in, const std::optional<Tensor>& cos_in,
    const std::optional<Tensor>& sin_in, double eps, bool halves, bool causal, double scale) {
  check_attention(q, k, v, mask, scale);
  check_attention_rows("q", q, q_norm_in, cos_in, sin_in, eps);
  check_attention_rows("k", k, k_norm_in, cos_in, sin_in, eps);
  const auto q_norm = contiguous(q_norm_in), k_norm = contiguous(k_norm_in);
  const auto cos = contiguous(cos_in), sin = contiguous(sin_in);
  return run(q, k, v, mask, attention_rows(q_norm, cos, sin, eps, halves),
             attention_rows(k_norm, cos, sin, eps, halves), causal, scale);
}

// The gradients in order: dq, dk, dv, dmask.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad_in, const Tensor& q_in,
                                                                  const Tensor& k_in, const Tensor& v_in,
                                                                  const std::optional<Tensor>& mask,
                                                                  const Tensor& out_in, const Tensor& lse, bool causal,
                                                                  double scale, bool mask_needs_grad) {
  check_attention(q_in, k_in, v_in, mask, scale);
  check_attention_backward(grad_in, q_in, mask, out_in, lse, mask_needs_grad);
  const Tensor q = with_unit_rows(q_in), k = with_unit_rows(k_in), v = with_unit_rows(v_in);
  const Tensor grad = with_unit_rows(grad_in), out = with_unit_rows(out_in);
  Tensor dq = output_like(q_in), dk = output_like(k_in), dv = output_like(v_in);
  Tensor dmask =
      torch::stable::empty(mask_needs_grad ? shape_of(*mask) : std::vector<int64_t>{0},
                           mask_needs_grad ? mask->scalar_type() : q.scalar_type(), std::nullopt, q.device());
  if (q.numel() == 0 || k.numel() == 0) {  // nothing attends, or nothing is attended to
    for (Tensor* t : {&dq, &dk, &dv, &dmask}) torch::stable::zero_(*t);
    return {dq, dk, dv, dmask};
  }
  AttentionParams params = attention_params(q, k, v, mask, out, lse, causal, scale);
  params.grad = attention_input(grad);
  params.dq = attention_output(dq), params.dk = attention_output(dk), params.dv = attention_output(dv);
  params.dmask = mask_needs_grad ? dmask.mutable_data_ptr() : nullptr;
  const int64_t parts = attention_backward_parts(params);
  const Tensor dq_parts = torch::stable::empty(std::vector<int64_t>{parts > 1 ? parts * q.numel() : 0},
                                               attention_lse_dtype(q), std::nullopt, q.device());
  IMAGEGEN_PICK_KERNEL(attention_backward_kernel, params.dtype)(params, dq_parts.mutable_data_ptr());
  return {dq, dk, dv, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_over_rows", TORCH_BOX(&attention_over_rows_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}

}  // namespace imagegen
