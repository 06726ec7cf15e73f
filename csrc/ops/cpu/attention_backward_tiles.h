// What the gradients of attention share: with P = exp(S - lse) recomputed and delta = sum over d of grad * out,
//     dV = P^T grad    dP = grad V^T    dS = P * (dP - delta)    dQ = scale dS K    dK = scale dS^T Q    dmask = dS
// Lanes are queries for S, dP and dQ, as in the forward, and elements of the head dimension for dK and dV.
#pragma once
#include "attention_tiles.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <class S>
class AttentionBackward {
 protected:
  using E = typename DotOf<S>::type;
  using T = typename E::T;
  static constexpr int L = kLanes<T>, kPanel = 2 * L, kPanels = 4;
  static constexpr int64_t kKeys = 8 * kRows, kQueries = kPanels * kPanel;  // of a block
  static constexpr int64_t kPairsOfQueries = kQueries / E::kPair;

  // [key][kQueries], for sums over queries: in bf16, neighbours are the pair of a step.
  using Weight = std::conditional_t<E::kPair == 2, bf16, T>;
  struct WeightRows {
    static constexpr int kRow = kPairsOfQueries, kStep = 1, kChunk = L;
  };

  const AttentionParams& p;
  const int64_t steps, chunks;
  const T scale;  // of scores, in units of log2

  explicit AttentionBackward(const AttentionParams& p)
      : p(p), steps(steps_of<E>(p.head_dim)), chunks(ceil_div(steps, L)), scale(T(p.scale * kLog2e)) {}

  bool seen(int64_t first_query, int64_t queries, int64_t first_key) const {
    return !p.causal || first_key <= first_query + queries - 1 + p.k_len - p.q_len;
  }

  // Takes T-sized parts of this thread's memory, one after another.
  struct Carver {
    T* p;
    T* take(int64_t n) {
      T* const part = p;
      p += round_up(n, 64 / sizeof(T));
      return part;
    }
  };

  struct Queries {
    T* q;      // [panel][step][kPanel]
    T* grad;   // [panel][step][kPanel]
    T* base;   // [kQueries]: lse in units of log2, infinity where nothing is attended to and past the last query
    T* delta;  // [kQueries]
    int64_t b, h, first, n, panels;

    Queries(Carver& carver, int64_t steps)
        : q(carver.take(kQueries * steps)),
          grad(carver.take(kQueries * steps)),
          base(carver.take(kQueries)),
          delta(carver.take(kQueries)) {}
  };

  // One of several blocks of packed keys at a time.
  struct Keys {
    const int64_t size;  // of a packed block
    T *all_k, *all_v;    // [block][size]
    T *k, *v;            // of this block: [group][chunk][kRows][L]
    T* s;                // [key][kPanel]
    T* ds;               // [key][kPanel]
    int64_t first, n;

    Keys(Carver& carver, int64_t chunks, int64_t blocks)
        : size(kKeys * chunks * L),
          all_k(carver.take(blocks * size)),
          all_v(carver.take(blocks * size)),
          s(carver.take((kKeys + 1) * kPanel)),
          ds(carver.take((kKeys + 1) * kPanel)) {}

    void select(int64_t block, int64_t first_key, int64_t keys) {
      k = all_k + block * size, v = all_v + block * size;
      first = first_key, n = keys;
    }
  };

  static int64_t scratch_elements(int64_t steps, int64_t chunks, int64_t blocks) {
    return 2 * kQueries * steps + 2 * kQueries + 2 * blocks * kKeys * chunks * L + 2 * (kKeys + 1) * kPanel + 16 * 16;
  }

  void load_queries(Queries& w, int64_t b, int64_t h, int64_t first) const {
    w.b = b, w.h = h, w.first = first, w.n = min(kQueries, p.q_len - first), w.panels = ceil_div(w.n, kPanel);
    const S* q = row_of<S>(p.q, b, h, first);
    const S* grad = row_of<S>(p.grad, b, h, first);
    const S* out = row_of<S>(p.out, b, h, first);
    const T* lse = static_cast<const T*>(p.lse) + (b * p.heads + h) * p.q_len + first;
    for (int64_t panel = 0, i = 0; i < w.n; ++panel, i += kPanel) {
      pack_lanes<E, 2>(q + i * p.q.row_stride, p.q.row_stride, w.n - i, p.head_dim, w.q + panel * steps * kPanel);
      pack_lanes<E, 2>(grad + i * p.grad.row_stride, p.grad.row_stride, w.n - i, p.head_dim,
                       w.grad + panel * steps * kPanel);
    }
    for (int64_t i = 0; i < w.panels * kPanel; ++i) {
      const bool live = i < w.n && lse[i] != -kInfinity<T>;
      w.base[i] = live ? lse[i] * T(kLog2e) : kInfinity<T>;
    }
    for (int64_t i = 0; i < w.panels * kPanel; i += L)
      store(w.delta + i, dots(grad + i * p.grad.row_stride, out + i * p.out.row_stride, w.n - i));
  }

  // The products of n rows, in lanes; sums across lanes one row at a time took a fifth of a backward over 77 keys.
  Vec<T> dots(const S* a, const S* b, int64_t n) const {
    Vec<T> rows[L], total{};
    for (int64_t i = 0; i < L; ++i, a += p.grad.row_stride, b += p.out.row_stride) {
      rows[i] = Vec<T>{};
      for (int64_t d = 0; i < n && d < p.head_dim; d += L)
        rows[i] += load(a + d, p.head_dim - d) * load(b + d, p.head_dim - d);
    }
    transpose<T>(rows);
    for (int i = 0; i < L; ++i) total += rows[i];
    return total;
  }

  void load_keys(Keys& w, int64_t block, int64_t b, int64_t kv_head, int64_t first, int64_t n) const {
    w.select(block, first, n);
    pack_rows<E>(row_of<S>(p.k, b, kv_head, first), p.k.row_stride, n, p.head_dim, w.k);
    pack_rows<E>(row_of<S>(p.v, b, kv_head, first), p.v.row_stride, n, p.head_dim, w.v);
  }

  ScoreMask<T, 2> mask_of(const Queries& q, int64_t panel) const {
    return ScoreMask<T, 2>(p, q.b, q.h, q.first + panel * kPanel);
  }

  // What a panel's queries see of these keys, made in bits[kSeenOfPanel]; null where they see all.
  const SeenBits* see(const Queries& q, int64_t panel, const Keys& keys, SeenBits* bits) const {
    const ScoreMask<T, 2> mask = mask_of(q, panel);
    if (!mask.hides(keys.first, keys.n)) return nullptr;
    mask.see(keys.first, keys.n, bits);
    return bits;
  }

  // Of one panel: P and dS, handed over as on_vector(key, vector, P, dS); dS also goes to keys.ds in the product's
  // steps of keys.
  template <class F>
  void score_gradients(const Queries& q, int64_t panel, const Keys& keys, const SeenBits* seen,
                       const F& on_vector) const {
    T top[kPanel];  // unused here
    for (int i = 0; i < kPanel; ++i) top[i] = 0;
    const RowGroups groups(keys.n);
    for (int64_t g = 0; g < groups.count; ++g) {
      const auto tile = score_tile_for_rows<E, 2>(groups.rows(g));
      const int64_t rows = g * chunks * kRows * L, columns = panel * steps * kPanel, to = groups.first(g) * kPanel;
      tile(keys.k + rows, q.q + columns, steps, keys.s + to, top, seen ? seen + groups.first(g) : nullptr);
      tile(keys.v + rows, q.grad + columns, steps, keys.ds + to, top, nullptr);
    }
    T scale_left = scale;
    if (p.mask.kind == AttentionMaskKind::additive) {
      Vec<T> largest[2] = {};
      mask_of(q, panel).add(keys.s, keys.first, keys.n, scale, largest);
      scale_left = 1;
    }
    Vec<T> base[2], delta[2];
    for (int v = 0; v < 2; ++v)
      base[v] = load(q.base + panel * kPanel + v * L), delta[v] = load(q.delta + panel * kPanel + v * L);
    if (E::kPair == 2 && keys.n % 2)  // the other half of the last step
      for (int v = 0; v < 2; ++v)
        store(keys.s + keys.n * kPanel + v * L, broadcast(-kInfinity<T>)),
            store(keys.ds + keys.n * kPanel + v * L, Vec<T>{});
    for (int64_t k = 0; k < keys.n; k += E::kPair) {
      Vec<T> ds[E::kPair][2];
      UNROLL(2) for (int i = 0; i < E::kPair; ++i) UNROLL(2) for (int v = 0; v < 2; ++v) {
        const int64_t from = (k + i) * kPanel + v * L;
        const Vec<T> e = exp2_of_negative<E::kPair == 2>(load(keys.s + from) * scale_left - base[v]);
        ds[i][v] = e * (load(keys.ds + from) - delta[v]);
        on_vector(k + i, v, e, ds[i][v]);
      }
      UNROLL(2)
      for (int v = 0; v < 2; ++v)
        store(keys.ds + k / E::kPair * kPanel + v * L,
              E::kPair == 2 ? join_rows<T>(ds[0][v], ds[E::kPair - 1][v]) : ds[0][v]);
    }
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
