#include "attention_rows_tile.h"
#include "common/parallel.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <class S, class Tensor>
INLINE auto row_of(const Tensor& t, int64_t b, int64_t h, int64_t i) {
  using Element = std::conditional_t<std::is_same_v<Tensor, AttentionInput>, const S, S>;
  return static_cast<Element*>(t.p) + b * t.batch_stride + h * t.head_stride + i * t.row_stride;
}

// f(row, b, h, index in the head) for a range of all rows.
template <class F>
INLINE void for_rows(const AttentionRowsParams& p, int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row / p.len;
    f(head / p.heads, head % p.heads, row % p.len);
  }
}

template <class S>
void forward(const AttentionRowsParams& p) {
  parallel_for(p.batch * p.heads * p.len, 64, [&](int64_t begin, int64_t end) {
    RowOfAttention<S> row(p.rows, p.head_dim);
    for_rows(p, begin, end, [&](int64_t b, int64_t h, int64_t i) {
      row.forward(row_of<S>(p.x, b, h, i), 0, 1, b, h, i, row_of<S>(p.y, b, h, i), 0);
    });
  });
}

template <class S>
void backward(const AttentionRowsParams& p) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kMost = RowOfAttention<S>::kMost;
  const int64_t total = p.batch * p.heads * p.len, n = attention_rows_per_part(total);
  parallel_for(attention_rows_parts(total), 1, [&](int64_t first, int64_t last) {
    RowOfAttention<S> row(p.rows, p.head_dim);
    alignas(64) T dnorm[kMost];
    for (int64_t part = first; part < last; ++part) {
      std::memset(dnorm, 0, sizeof(dnorm));
      for_rows(p, part * n, min(total, (part + 1) * n), [&](int64_t b, int64_t h, int64_t i) {
        row.backward(row_of<S>(p.grad, b, h, i), row_of<S>(p.x, b, h, i), b, h, i, row_of<S>(p.y, b, h, i), dnorm);
      });
      if (p.dnorm) std::memcpy(static_cast<T*>(p.dnorm_parts) + part * p.head_dim, dnorm, p.head_dim * sizeof(T));
    }
  });
  if (!p.dnorm) return;
  for (int64_t d = 0; d < p.head_dim; d += L) {
    Vec<T> sum{};
    for (int64_t part = 0; part < attention_rows_parts(total); ++part)
      sum += load(static_cast<const T*>(p.dnorm_parts) + part * p.head_dim + d, p.head_dim - d);
    store(static_cast<T*>(p.dnorm) + d, sum, p.head_dim - d);
  }
}

}  // namespace

void attention_rows_kernel(const AttentionRowsParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() { p.grad.p ? backward<S>(p) : forward<S>(p); });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
