// The product all convolutions are made of: M[rows][2 vectors] = sum over steps of T[rows] * U[2 vectors].
//
// T is broadcast, U is loaded: 12 rows by 2 vectors fill the 32 registers of AVX-512 (6 by 2 the 16 of older sets) and
// every broadcast is used twice, so that the multipliers are the limit. A step is one input channel, or two in bf16
// dot products. T is packed [chunk of L steps][kRows][L] and U [step][2 vectors]: constant offsets, sequential reads.
#pragma once
#include "simd.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

constexpr int kRows = kVectorBytes == 64 ? 12 : 6;
constexpr int kPanelVectors = 2;

// How a step multiplies: acc += u * t, with kPair channels a step.
struct FloatDot {
  using T = float;
  static constexpr int kPair = 1;
  static INLINE Vec<float> dot(Vec<float> acc, Vec<float> u, float t) { return acc + u * t; }
};
struct DoubleDot {
  using T = double;
  static constexpr int kPair = 1;
  static INLINE Vec<double> dot(Vec<double> acc, Vec<double> u, double t) { return acc + u * t; }
};
#if defined(__AVX512BF16__)
struct Bf16Dot {
  using T = float;  // the bits of two bf16
  static constexpr int kPair = 2;
  static INLINE Vec<float> dot(Vec<float> acc, Vec<float> u, float t) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)u, (__m512bh)broadcast(t));
  }
};
#endif
// Calls f.template operator()<E>() with this instruction set's product for a dtype.
template <class F>
INLINE void dispatch_dot([[maybe_unused]] Dtype dtype, const F& f) {
#if defined(__AVX512BF16__)
  f.template operator()<Bf16Dot>();
#else
  if constexpr (kVectorBytes == 16)
    if (dtype == Dtype::f64) return f.template operator()<DoubleDot>();
  f.template operator()<FloatDot>();
#endif
}

// What comes next in U, to be brought to the second-level cache meanwhile: 3-7 % where the weights exceed it.
template <class T>
struct Prefetch {
  const T* next = nullptr;
  int lines_per_chunk = 0;
};

// Where the broadcast operand keeps row r of step k: at r * kRow + k * kStep, kChunk further on every L steps.
template <class T>
struct ChunkedRows {  // [chunk of L steps][kRows][L]
  static constexpr int kRow = kLanes<T>, kStep = 1, kChunk = kRows * kLanes<T>;
};
template <class T, int R>
struct InterleavedRows {  // [step][R]
  static constexpr int kRow = 1, kStep = R, kChunk = R * kLanes<T>;
};

struct Nothing {
  INLINE void operator()() const {}
};

// acc[rows][V vectors] += sum over steps of t[rows] * u[V vectors]; u is [step][V * L].
template <class E, class Rows, int R, int V, class T = typename E::T, class OnChunk = Nothing>
INLINE void accumulate(const T* t, const T* u, int64_t steps, Vec<T> (&acc)[R][V], const OnChunk& on_chunk = {},
                       const Rows rows = {}) {
  constexpr int L = kLanes<T>;
  const auto step = [&](int k) __attribute__((always_inline)) {
    Vec<T> w[V];
    UNROLL(6) for (int v = 0; v < V; ++v) w[v] = load(u + v * L);
    UNROLL(12)
    for (int r = 0; r < R; ++r)
      UNROLL(6) for (int v = 0; v < V; ++v) acc[r][v] = E::dot(acc[r][v], w[v], t[r * rows.kRow + k * Rows::kStep]);
    u += V * L;
  };
  for (int64_t c = 0; c < steps / L; ++c, t += Rows::kChunk) {
    on_chunk();
    UNROLL(4) for (int k = 0; k < L; ++k) step(k);
  }
  for (int k = 0; k < steps % L; ++k) step(k);
}

template <class E, int R, int V, class T = typename E::T>
void multiply(const T* t, const T* u, int64_t steps, T* m, Prefetch<T> prefetch) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V];
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  accumulate<E, ChunkedRows<T>>(t, u, steps, acc, [&] {
    for (int i = 0; i < prefetch.lines_per_chunk; ++i, prefetch.next += 64 / sizeof(T))
      __builtin_prefetch(prefetch.next, 0, 2);
  });
  UNROLL(12)
  for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) store(m + (r * kPanelVectors + v) * L, acc[r][v]);
}

template <class E>
using Multiply = void (*)(const typename E::T*, const typename E::T*, int64_t, typename E::T*, Prefetch<typename E::T>);

template <class E, int V, int R = kRows>
INLINE Multiply<E> multiply_for_rows(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return multiply_for_rows<E, V, R - 1>(rows);
  return &multiply<E, R, V>;
}

// n rows in ceil(n / kRows) nearly equal groups, so that no group is mostly empty.
struct RowGroups {
  int64_t n, count;
  explicit RowGroups(int64_t n) : n(n), count(ceil_div(n, kRows)) {}
  int64_t first(int64_t g) const { return g * (n / count) + min(g, n % count); }
  int64_t of(int64_t i) const {  // the group of row i
    const int64_t base = n / count, longer = n % count;
    return i < longer * (base + 1) ? i / (base + 1) : longer + (i - longer * (base + 1)) / base;
  }
  int64_t rows(int64_t g) const { return first(g + 1) - first(g); }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
