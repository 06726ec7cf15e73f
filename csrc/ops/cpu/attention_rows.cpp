#include "ops/attention_rows.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu_capability.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void attention_rows_kernel(const AttentionRowsParams&))

namespace {

using Optional = std::optional<Tensor>;

AttentionRowsParams rows_params(const Tensor& x, const Tensor& y, const AttentionRows& rows) {
  AttentionRowsParams p{};
  p.x = attention_input(x), p.y = attention_output(y), p.rows = rows;
  p.dtype = check_dtype("attention", "x", x);
  p.batch = x.size(0), p.heads = x.size(1), p.len = x.size(2), p.head_dim = x.size(3);
  return p;
}

Tensor attention_rows_cpu(const Tensor& x_in, const Optional& norm_in, const Optional& cos_in, const Optional& sin_in,
                          double eps, bool halves) {
  check_attention_rows("x", x_in, norm_in, cos_in, sin_in, eps);
  const Tensor x = with_unit_rows(x_in);
  const Optional norm = contiguous(norm_in), cos = contiguous(cos_in), sin = contiguous(sin_in);
  const Tensor y = empty_like_heads(x_in);
  const AttentionRowsParams params = rows_params(x, y, attention_rows(norm, cos, sin, eps, halves));
  if (y.numel() > 0) IMAGEGEN_PICK_KERNEL(attention_rows_kernel, params.dtype)(params);
  return y;
}

std::tuple<Tensor, Tensor> attention_rows_backward_cpu(const Tensor& grad_in, const Tensor& x_in,
                                                       const Optional& norm_in, const Optional& cos_in,
                                                       const Optional& sin_in, double eps, bool halves) {
  check_attention_rows("x", x_in, norm_in, cos_in, sin_in, eps);
  check_same_device("attention", "grad", grad_in, x_in);
  check_same_dtype("attention", "grad", grad_in, x_in);
  check_shape("attention", "grad", grad_in, shape_of(x_in), x_in);
  const Tensor x = with_unit_rows(x_in), grad = with_unit_rows(grad_in);
  const Optional norm = contiguous(norm_in), cos = contiguous(cos_in), sin = contiguous(sin_in);
  const Tensor dx = empty_like_heads(x_in);
  const int64_t D = x.size(3), parts = attention_rows_parts(x.size(0) * x.size(1) * x.size(2));
  const auto sums = [&](int64_t n) {
    return torch::stable::empty(std::vector<int64_t>{n}, attention_lse_dtype(x), std::nullopt, x.device());
  };
  Tensor dnorm = sums(norm ? D : 0);
  const Tensor dnorm_parts = sums(norm ? parts * D : 0);
  if (dx.numel() == 0) {
    torch::stable::zero_(dnorm);
    return {dx, dnorm};
  }
  AttentionRowsParams params = rows_params(x, dx, attention_rows(norm, cos, sin, eps, halves));
  params.grad = attention_input(grad);
  params.dnorm = norm ? dnorm.mutable_data_ptr() : nullptr, params.dnorm_parts = dnorm_parts.mutable_data_ptr();
  IMAGEGEN_PICK_KERNEL(attention_rows_kernel, params.dtype)(params);
  return {dx, dnorm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("attention_rows", TORCH_BOX(&attention_rows_cpu));
  m.impl("attention_rows_backward", TORCH_BOX(&attention_rows_backward_cpu));
}

}  // namespace imagegen
