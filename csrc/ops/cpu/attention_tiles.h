// What attention's forward and backward are made of. Lanes are queries: a panel is one or two vectors of them, scores
// are S^T[key][query] = sum over d of K[key][d] Q^T[d][query] and outputs O^T[d][query] = sum over keys of V^T P^T,
// with K and V broadcast. So no sum runs across lanes, every head dimension costs what it should, K and V are copied
// and not transposed, and only Q and O are turned, once.
#pragma once
#include "attention_mask_tile.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// The product for elements S: bf16 pairs where the machine multiplies them, float or double elsewhere.
template <class S>
struct DotOf {
  using type = FloatDot;
};
template <>
struct DotOf<double> {
  using type = DoubleDot;
};
#if defined(__AVX512BF16__)
template <>
struct DotOf<bf16> {
  using type = Bf16Dot;
};
#endif

// Where a row of a tensor begins, in its elements S.
template <class S, class Void>
INLINE auto row_of(const AttentionTensor<Void>& t, int64_t b, int64_t h, int64_t row) {
  using Element = std::conditional_t<std::is_const_v<Void>, const S, S>;
  return static_cast<Element*>(t.p) + b * t.batch_stride + h * t.head_stride + row * t.row_stride;
}

// ---- packing: n rows of head_dim elements each

template <class E>
INLINE int64_t steps_of(int64_t n) {
  return ceil_div(n, E::kPair);
}

// n >= 1 neighbours as one vector of steps, zeros past them.
template <class E, class S>
INLINE Vec<typename E::T> load_steps(const S* p, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (E::kPair == 2) {
    const __mmask32 m = n >= 32 ? ~0u : (1u << n) - 1;
    return (Vec<float>)_mm512_maskz_loadu_epi16(m, p);
  }
#endif
  if constexpr (E::kPair == 1) return load(p, n);
}

// n rows that will soon be read, or written: those of a head lie far apart, where no hardware foresees them. They are
// asked for in `parts` while products go on; a core that asks for all at once waits for them. 6-9 % of a forward over
// text's 77 keys or over 256.
template <class S>
class RowsToCome {
  S* row;
  const int64_t row_stride, head_dim, share;
  int64_t left;

 public:
  RowsToCome(S* x, int64_t row_stride, int64_t n, int64_t head_dim, int64_t parts)
      : row(x), row_stride(row_stride), head_dim(head_dim), share(ceil_div(n, max<int64_t>(1, parts))), left(n) {}

  INLINE void ask() {
    for (int64_t i = min(share, left); i > 0; --i, --left, row += row_stride)
      for (uintptr_t line = uintptr_t(row) & -64, end = uintptr_t(row + head_dim); line < end; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(line), !std::is_const_v<S>);
  }
};

// Rows become lanes, [step of head_dim][V * L] and what else a step has; lanes past the last row are 0.
template <class E, int V, class S>
void pack_lanes(const S* x, int64_t row_stride, int64_t n, int64_t head_dim, typename E::T* to,
                int64_t step_size = V * kLanes<typename E::T>) {
  using T = typename E::T;
  constexpr int L = kLanes<T>, kChunk = L * E::kPair;
  const int64_t steps = steps_of<E>(head_dim);
  for (int v = 0; v < V; ++v)
    for (int64_t c = 0; c < steps; c += L) {
      const S* from = x + v * L * row_stride + c * E::kPair;
      const int64_t rows = n - v * L, rest = head_dim - c * E::kPair;
      Vec<T> r[L];
      if (rows >= L && rest >= kChunk)
        UNROLL(16) for (int i = 0; i < L; ++i) r[i] = load_steps<E>(from + i * row_stride, kChunk);
      else
        for (int i = 0; i < L; ++i) r[i] = i < rows ? load_steps<E>(from + i * row_stride, rest) : Vec<T>{};
      transpose<T>(r);
      for (int i = 0; i < min<int64_t>(L, steps - c); ++i) store(to + (c + i) * step_size + v * L, r[i]);
    }
}

// The keys' side of sums over head_dim: [group of rows][chunk of L steps][kRows][L].
template <class E, class S>
void pack_rows(const S* x, int64_t row_stride, int64_t n, int64_t head_dim, typename E::T* to) {
  constexpr int L = kLanes<typename E::T>, kChunk = L * E::kPair;
  const RowGroups groups(n);
  const int64_t chunks = ceil_div(head_dim, kChunk), whole = head_dim / kChunk;
  for (int64_t g = 0; g < groups.count; ++g, to += chunks * kRows * L)
    for (int64_t r = 0; r < groups.rows(g); ++r) {
      const S* from = x + (groups.first(g) + r) * row_stride;
      for (int64_t c = 0; c < whole; ++c) store(to + (c * kRows + r) * L, load_steps<E>(from + c * kChunk, kChunk));
      if (whole < chunks)
        store(to + (whole * kRows + r) * L, load_steps<E>(from + whole * kChunk, head_dim - whole * kChunk));
    }
}

// One step of a sum over rows: R elements from d of a row, or of two rows side by side. Whole vectors go out: what is
// past R the next step overwrites, since masked stores are slow.
template <class E, class S>
INLINE void store_step(const S* row, [[maybe_unused]] const S* next_row, int64_t d, int64_t R, int64_t head_dim,
                       typename E::T* to) {
  constexpr int L = kLanes<typename E::T>;
  for (int64_t i = 0; i < R; i += L, d += L) {
#if defined(__AVX512BF16__)
    if constexpr (E::kPair == 2) {
      const __mmask16 m = R - i >= L ? 0xffff : (1u << (R - i)) - 1;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row + d));
      const __m512i high =
          next_row ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, next_row + d)) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#endif
    if constexpr (E::kPair == 1) store(to + i, d + L <= head_dim ? load(row + d) : load(row + d, head_dim - d));
  }
}

// The keys' side of sums over keys: [group of head_dim][step][elements of the group], and up to L more.
template <class E, class S>
void pack_steps(const S* x, int64_t row_stride, int64_t n, int64_t head_dim, typename E::T* to) {
  const RowGroups groups(head_dim);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t R = groups.rows(g), d = groups.first(g);
    for (int64_t k = 0; k < n; k += E::kPair, to += R)
      store_step<E>(x + k * row_stride, k + 1 < n ? x + (k + 1) * row_stride : nullptr, d, R, head_dim, to);
  }
}

// One step of a sum over rows: L elements from d of row i, or of rows i and i + 1 side by side, zeros past the last
// row.
template <class E, class S>
INLINE Vec<typename E::T> step_of_rows(const S* x, int64_t row_stride, int64_t n, int64_t head_dim, int64_t i,
                                       int64_t d) {
#if defined(__AVX512BF16__)
  if constexpr (E::kPair == 2) {
    const __mmask16 m = head_dim - d >= 16 ? 0xffff : (1u << (head_dim - d)) - 1;
    const auto half = [&](int64_t row) {
      return row < n ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x + row * row_stride + d))
                     : _mm512_setzero_si512();
    };
    return (Vec<float>)_mm512_or_si512(half(i), _mm512_slli_epi32(half(i + 1), 16));
  }
#endif
  if constexpr (E::kPair == 1) return i < n ? load(x + i * row_stride + d, head_dim - d) : Vec<typename E::T>{};
}

// The rows' side of sums over them, elements from d as lanes: [step][vectors].
template <class E, class S>
void pack_panel(const S* x, int64_t row_stride, int64_t n, int64_t head_dim, int64_t d, int64_t vectors, int64_t steps,
                typename E::T* to) {
  constexpr int64_t L = kLanes<typename E::T>;
  for (int64_t i = 0; i < steps; ++i)
    for (int64_t v = 0; v < vectors; ++v, to += L)
      store(to, step_of_rows<E>(x, row_stride, n, head_dim, i * E::kPair, d + v * L));
}

// O^T [d][V * L] times a factor per lane, out to rows. The last vector of a row overlaps the one before.
template <int V, class S, class T>
void store_lanes(const T* o, const Vec<T>* factor, int64_t n, int64_t head_dim, S* to, int64_t row_stride) {
  constexpr int L = kLanes<T>;
  for (int v = 0; v < V; ++v)
    for (int64_t start = 0; start < head_dim; start += L) {
      const int64_t d = max<int64_t>(0, min(start, head_dim - L)), width = head_dim - d, rows = n - v * L;
      S* out = to + v * L * row_stride + d;
      Vec<T> r[L];
      if (width >= L)
        UNROLL(16) for (int i = 0; i < L; ++i) r[i] = load(o + (d + i) * V * L + v * L) * factor[v];
      else
        for (int i = 0; i < L; ++i) r[i] = i < width ? load(o + (d + i) * V * L + v * L) * factor[v] : Vec<T>{};
      transpose<T>(r);
      if (rows >= L && width >= L)
        UNROLL(16) for (int i = 0; i < L; ++i) store(out + i * row_stride, r[i]);
      else
        for (int i = 0; i < min<int64_t>(L, rows); ++i) store(out + i * row_stride, r[i], width);
    }
}

// ---- products

// s[R keys][V * L] = K Q^T, -infinity where a query does not see a key; all see all where `seen` is null. top[V * L]
// becomes the largest of itself and the scores.
template <class E, int V, int R, class T = typename E::T>
void score_tile(const T* k, const T* q, int64_t steps, T* s, T* top, const SeenBits* seen) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V], largest[V];
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  accumulate<E, ChunkedRows<T>>(k, q, steps, acc);
  if (seen) UNROLL(12)
  for (int r = 0; r < R; ++r)
    UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] = hide_unseen<T>(acc[r][v], seen[v * kSeenStride + r]);
  UNROLL(2) for (int v = 0; v < V; ++v) largest[v] = load(top + v * L);
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) {
    store(s + (r * V + v) * L, acc[r][v]);
    largest[v] = larger(largest[v], acc[r][v]);
  }
  UNROLL(2) for (int v = 0; v < V; ++v) store(top + v * L, largest[v]);
}

// o[R elements of head_dim][V * L] = V^T P^T + alpha[V * L] * o, without what was in o where alpha is null. What was
// there joins last: the sums stay short and their rounding errors small.
template <class E, int V, int R, class T = typename E::T>
void value_tile(const T* values, const T* p, int64_t steps, T* o, const T* alpha) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V];
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  accumulate<E, InterleavedRows<T, R>>(values, p, steps, acc);
  if (alpha) {
    Vec<T> a[V];
    UNROLL(2) for (int v = 0; v < V; ++v) a[v] = load(alpha + v * L);
    UNROLL(12)
    for (int r = 0; r < R; ++r)
      UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] = a[v] * load(o + (r * V + v) * L) + acc[r][v];
  }
  UNROLL(12)
  for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) store(o + (r * V + v) * L, acc[r][v]);
}

template <class E, int V, int R = kRows>
INLINE auto score_tile_for_rows(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return score_tile_for_rows<E, V, R - 1>(rows);
  return &score_tile<E, V, R>;
}
template <class E, int V, int R = kRows>
INLINE auto value_tile_for_rows(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return value_tile_for_rows<E, V, R - 1>(rows);
  return &value_tile<E, V, R>;
}

// ---- across lanes

// What `op` makes of the lanes of each of L vectors: lane i that of r[i], which is written over.
template <class T, int H = kLanes<T> / 2, class Op>
INLINE Vec<T> across_lanes(Vec<T>* r, const Op& op) {
  UNROLL(8) for (int i = 0; i < H; ++i) {
    exchange<H>(r[i], r[i + H], std::make_integer_sequence<int, kLanes<T>>{});
    r[i] = op(r[i], r[i + H]);
  }
  if constexpr (H > 1) return across_lanes<T, H / 2>(r, op);
  return r[0];
}

// ---- exponentials

// Rows 2k and 2k + 1 side by side as bf16.
template <class T>
INLINE Vec<T> join_rows([[maybe_unused]] Vec<T> even, [[maybe_unused]] Vec<T> odd) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 4) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Vec<float>)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave),
                                                (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
  }
#endif
  return even;
}

// s[n keys][V * L] becomes 2^(scale * s - base) in place, in pairs of keys where the product takes pairs; their sums
// are added to sum. An odd last key has the room of a pair.
template <class E, int V, class T = typename E::T>
void exponentials(T* s, int64_t n, T scale, const Vec<T>* base, Vec<T>* sum) {
  constexpr int L = kLanes<T>;
  constexpr bool kRough = E::kPair == 2;
  Vec<T> total[V] = {};  // the block's own sum first, for short sums
  if (kRough && n % 2)
    for (int v = 0; v < V; ++v) store(s + (n * V + v) * L, broadcast(-kInfinity<T>));
  T* p = s;
  UNROLL(2)
  for (int64_t k = 0; k < n; k += E::kPair, s += E::kPair * V * L, p += V * L) {
    Vec<T> e[E::kPair][V];
    UNROLL(2) for (int i = 0; i < E::kPair; ++i) UNROLL(2) for (int v = 0; v < V; ++v) {
      e[i][v] = exp2_of_negative<kRough>(load(s + (i * V + v) * L) * scale - base[v]);
      total[v] += e[i][v];
    }
    UNROLL(2)
    for (int v = 0; v < V; ++v) store(p + v * L, E::kPair == 2 ? join_rows<T>(e[0][v], e[E::kPair - 1][v]) : e[0][v]);
  }
  for (int v = 0; v < V; ++v) sum[v] += total[v];
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
