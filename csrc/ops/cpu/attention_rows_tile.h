// One row of attention_rows, forward and backward: a row fits the first-level cache many times over.
#pragma once
#include "common/simd.h"
#include "ops/attention_rows.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <class S>
class RowOfAttention {
  using T = Compute<S>;
  static constexpr int L = kLanes<T>;

  const AttentionRows& rows;
  const int64_t head_dim, half;

 public:
  static constexpr int64_t kMost = kAttentionMaxHeadDim + L;  // elements of a row and what a last vector has more

  RowOfAttention(const AttentionRows& rows, int64_t head_dim) : rows(rows), head_dim(head_dim), half(head_dim / 2) {}

  // y[n][head_dim] from rows of x that begin at (b, h, first).
  void forward(const S* x, int64_t row_stride, int64_t n, int64_t b, int64_t h, int64_t first, S* y,
               int64_t y_row_stride) {
    for (int64_t i = 0; i < n; ++i, x += row_stride, y += y_row_stride) {
      const T r = load_row(x);
      if (rows.norm)
        for (int64_t d = 0; d < head_dim; d += L) store(u + d, load(u + d) * (load_norm(d) * r));
      if (rows.cos) rotate(b, h, first + i, T(1));
      for (int64_t d = 0; d < head_dim; d += L) store(y + d, load(u + d), head_dim - d);
    }
  }

  // dx of one row, and dnorm[head_dim] += that of its norm. With r = rsqrt(mean(x^2) + eps) and g the gradient of
  // x r norm:  dnorm = g x r,  dx = r (g norm - x r^2 mean(g norm x)).
  void backward(const S* grad, const S* x, int64_t b, int64_t h, int64_t row, S* dx, T* dnorm) {
    for (int64_t d = 0; d < head_dim; d += L) store(u + d, load(grad + d, head_dim - d));
    if (rows.cos) rotate(b, h, row, T(-1));
    if (rows.norm) {
      for (int64_t d = 0; d < head_dim; d += L) store(w + d, load(u + d));
      const T r = load_row(x);  // x is in u, g in w
      Vec<T> total{};
      for (int64_t d = 0; d < head_dim; d += L) {
        const Vec<T> x_r = load(u + d) * r, g = load(w + d), g_norm = g * load_norm(d);
        store(dnorm + d, load(dnorm + d) + g * x_r);
        store(u + d, x_r), store(w + d, g_norm);
        total += g_norm * x_r;
      }
      const T mean = sum<T>(total) / T(head_dim);
      for (int64_t d = 0; d < head_dim; d += L) store(u + d, (load(w + d) - load(u + d) * mean) * r);
    }
    for (int64_t d = 0; d < head_dim; d += L) store(dx + d, load(u + d), head_dim - d);
  }

 private:
  alignas(64) T u[kMost], w[kMost];

  INLINE Vec<T> load_norm(int64_t d) const { return load(static_cast<const T*>(rows.norm) + d, head_dim - d); }

  // x to u, zeros behind it; returns what a norm multiplies it by.
  T load_row(const S* x) {
    Vec<T> squares{};
    for (int64_t d = 0; d < head_dim; d += L) {
      const Vec<T> v = load(x + d, head_dim - d);
      squares += v * v;
      store(u + d, v);
    }
    return rows.norm ? T(1) / std::sqrt(sum<T>(squares) / T(head_dim) + T(rows.eps)) : T(1);
  }

  // u by the angles of this row, or back by them (sign -1).
  void rotate(int64_t b, int64_t h, int64_t row, T sign) {
    const int64_t at = b * rows.batch_stride + h * rows.head_stride + row * rows.row_stride;
    const T *cos = static_cast<const T*>(rows.cos) + at, *sin = static_cast<const T*>(rows.sin) + at;
    rows.halves ? rotate_pairs<true>(cos, sin, sign) : rotate_pairs<false>(cos, sin, sign);
  }
  template <bool kHalves>
  void rotate_pairs(const T* cos, const T* sin, T sign) {
    for (int64_t i = 0; i < half; ++i) {
      T& first = u[kHalves ? i : 2 * i];
      T& second = u[kHalves ? i + half : 2 * i + 1];
      const T a = first, c = second, s = sign * sin[i];
      first = a * cos[i] - c * s;
      second = a * s + c * cos[i];
    }
  }
};

template <class S>
struct RowsAt {
  const S* p;
  int64_t stride;
};

// n rows from `first` of head h, normalised and rotated in `to` where they are to be: once for all that read them.
template <class S>
RowsAt<S> prepare(const AttentionRows& how, RowsAt<S> x, int64_t n, int64_t head_dim, int64_t b, int64_t h,
                  int64_t first, S* to) {
  if (!how.any()) return x;
  RowOfAttention<S>(how, head_dim).forward(x.p, x.stride, n, b, h, first, to, head_dim);
  return {to, head_dim};
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
