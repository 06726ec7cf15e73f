#include "ops/attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cuda_stream.h"

namespace imagegen {

namespace cuda {
bool attention_sm90_takes(const AttentionParams&);
cudaError_t attention_sm90_kernel(const AttentionParams&, cudaStream_t);
cudaError_t attention_kernel(const AttentionParams&, cudaStream_t);
cudaError_t attention_backward_kernel(const AttentionParams&, cudaStream_t);
}  // namespace cuda

namespace {

// In the words of _declines in imagegen/ops/attention.py.
void check_kernel_takes(const Tensor& q) {
  IMAGEGEN_CHECK(q.scalar_type() != ScalarType::Double,
                 "attention: the cuda kernel takes float32, bfloat16 or float16, q is torch.float64");
}

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                          const std::optional<Tensor>& mask, bool causal, double scale) {
  check_attention(q_in, k_in, v_in, mask, scale);
  check_kernel_takes(q_in);
  const CudaScope scope(q_in);
  const Tensor q = with_unit_rows(q_in), k = with_unit_rows(k_in), v = with_unit_rows(v_in);
  const Tensor out = empty_like_heads(q);
  const Tensor lse =
      torch::stable::empty({q.size(0), q.size(1), q.size(2)}, attention_lse_dtype(q), std::nullopt, q.device());
  if (lse.numel() == 0) return {out, lse};
  AttentionParams params = attention_params(q, k, v, mask, out, lse, causal, scale);
  params.multiprocessors = scope.multiprocessors();
  const bool sm90 = scope.runs_sm90a() && cuda::attention_sm90_takes(params);
  check_launch("attention", (sm90 ? cuda::attention_sm90_kernel : cuda::attention_kernel)(params, scope.stream));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cuda(const Tensor& grad_in, const Tensor& q_in,
                                                                   const Tensor& k_in, const Tensor& v_in,
                                                                   const std::optional<Tensor>& mask,
                                                                   const Tensor& out_in, const Tensor& lse, bool causal,
                                                                   double scale, bool mask_needs_grad) {
  check_attention(q_in, k_in, v_in, mask, scale);
  check_attention_backward(grad_in, q_in, mask, out_in, lse, mask_needs_grad);
  check_kernel_takes(q_in);
  const CudaScope scope(q_in);
  const Tensor q = with_unit_rows(q_in), k = with_unit_rows(k_in), v = with_unit_rows(v_in);
  const Tensor grad = with_unit_rows(grad_in), out = with_unit_rows(out_in);
  Tensor dq = empty_like_heads(q), dk = empty_like_heads(k), dv = empty_like_heads(v);
  Tensor dmask = mask_needs_grad ? torch::stable::empty(shape_of(*mask), mask->scalar_type(), std::nullopt, q.device())
                                 : torch::stable::empty({0}, q.scalar_type(), std::nullopt, q.device());
  if (q.numel() == 0 || k.numel() == 0) {
    for (Tensor* t : {&dq, &dk, &dv, &dmask}) torch::stable::zero_(*t);
    return {dq, dk, dv, dmask};
  }
  const Tensor delta = torch::stable::empty(shape_of(lse), ScalarType::Float, std::nullopt, q.device());
  AttentionParams params = attention_params(q, k, v, mask, out, lse, causal, scale);
  params.grad = attention_input(grad);
  params.dq = attention_output(dq), params.dk = attention_output(dk), params.dv = attention_output(dv);
  params.delta = static_cast<float*>(delta.mutable_data_ptr());
  if (mask_needs_grad) {
    params.dmask = dmask.mutable_data_ptr();
    for (int64_t d = 0; d < 4; ++d) params.mask_size[d] = d < 4 - mask->dim() ? 1 : mask->size(d - (4 - mask->dim()));
  }
  check_launch("attention", cuda::attention_backward_kernel(params, scope.stream));
  return {dq, dk, dv, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cuda));
}

}  // namespace imagegen
