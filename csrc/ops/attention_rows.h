// attention_rows: what becomes of the rows of q and k on their way into attention,
//     u = x rsqrt(mean(x^2) + eps) norm        where there is a norm
//     y = u with each pair of its elements (a, b) as (a cos - b sin, a sin + b cos)   where there is a rotation
#pragma once
#include "ops/attention.h"

namespace imagegen {

// In the type sums are kept in. Strides are 0 along the axes that cos and sin do not have.
struct AttentionRows {
  const void* norm;       // [D], or null
  const void *cos, *sin;  // [B, H, L, D/2], or null
  int64_t batch_stride, head_stride, row_stride;
  double eps;
  bool halves;  // the pairs are (i, i + D/2), else the neighbours (2i, 2i + 1)
  bool any() const { return norm || cos; }
};

struct AttentionRowsParams {
  AttentionInput x;  // [B, H, L, D]
  AttentionRows rows;
  AttentionInput grad;  // of y, for the backward
  AttentionOutput y;    // or the gradient of x
  void* dnorm;          // [D], of norm, or null
  void* dnorm_parts;    // [attention_rows_parts, D]: workspace of its sums
  Dtype dtype;
  int64_t batch, heads, len, head_dim;
};

// The rows are cut by their number alone, so that any number of threads sums alike.
inline int64_t attention_rows_per_part(int64_t rows) {
  constexpr int64_t kFewest = 64, kMostParts = 256;
  const int64_t n = (rows + kMostParts - 1) / kMostParts;
  return n > kFewest ? n : kFewest;
}
inline int64_t attention_rows_parts(int64_t rows) {
  const int64_t n = attention_rows_per_part(rows);
  return (rows + n - 1) / n;
}

}  // namespace imagegen

#ifdef TORCH_STABLE_ONLY
namespace imagegen {

// What q (or k) named `argument` may be normalised and rotated by.
inline void check_attention_rows(const char* argument, const Tensor& x, const std::optional<Tensor>& norm,
                                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps) {
  constexpr const char* op = "attention";
  const ScalarType compute = attention_lse_dtype(x);
  check_dtype(op, argument, x);
  IMAGEGEN_CHECK(x.dim() == 4, op, ": ", argument, " must have shape (B, H, L, D), got ", shape_string(x));
  const int64_t D = x.size(3);
  if (norm) {
    const std::string name = std::string(argument) + "_norm";
    check_same_device(op, name.c_str(), *norm, x, argument);
    IMAGEGEN_CHECK(norm->scalar_type() == compute, op, ": ", name, " must be ", dtype_string(compute), ", got ",
                   dtype_string(norm->scalar_type()));
    IMAGEGEN_CHECK(shape_of(*norm) == std::vector<int64_t>{D}, op, ": ", name, " must have shape (", D, ",), got ",
                   shape_string(*norm));
  }
  IMAGEGEN_CHECK(cos.has_value() == sin.has_value(), op, ": rotary must be a pair (cos, sin)");
  if (cos) {
    IMAGEGEN_CHECK(D % 2 == 0, op, ": rotary must be None where D is odd, got D = ", D);
    const std::vector<int64_t> full{x.size(0), x.size(1), x.size(2), D / 2};
    for (const Tensor* t : {&*cos, &*sin}) {
      check_same_device(op, "rotary", *t, x, argument);
      IMAGEGEN_CHECK(t->scalar_type() == compute, op, ": rotary must be ", dtype_string(compute), ", got ",
                     dtype_string(t->scalar_type()));
      bool broadcasts = 1 <= t->dim() && t->dim() <= 4 && t->size(t->dim() - 1) == D / 2;
      for (int64_t d = 0; broadcasts && d < t->dim(); ++d)
        broadcasts = t->size(d) == 1 || t->size(d) == full[4 - t->dim() + d];
      IMAGEGEN_CHECK(broadcasts, op, ": rotary must have shapes that broadcast to ", argument,
                     "'s (B, H, L, D/2) = ", shape_string(full), ", got ", shape_string(*t));
    }
    IMAGEGEN_CHECK(shape_of(*cos) == shape_of(*sin), op, ": rotary must be a pair of one shape, got ",
                   shape_string(*cos), " and ", shape_string(*sin));
  }
  IMAGEGEN_CHECK(0 <= eps && eps < INFINITY, op, ": norm_eps must be at least 0 and finite, got ", eps);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : t;
}

// norm, cos and sin are contiguous.
inline AttentionRows attention_rows(const std::optional<Tensor>& norm, const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin, double eps, bool halves) {
  AttentionRows rows{};
  rows.eps = eps, rows.halves = halves;
  if (norm) rows.norm = norm->const_data_ptr();
  if (!cos) return rows;
  rows.cos = cos->const_data_ptr(), rows.sin = sin->const_data_ptr();
  int64_t* const strides[] = {&rows.row_stride, &rows.head_stride, &rows.batch_stride};
  for (int64_t d = 0; d + 1 < cos->dim(); ++d)
    if (cos->size(d) > 1) *strides[cos->dim() - 2 - d] = cos->stride(d);
  return rows;
}

}  // namespace imagegen
#endif
