// Attention over few keys, as text's 77, in float: all scores of a query at once. Lanes are keys for scores and
// elements of head_dim for outputs,
//     S[query][key] = sum over d of Q[query][d] K^T[d][key]    O[query][d] = sum over keys of P[query][key] V[key][d]
// with Q and P broadcast: K alone is turned, once per block of queries. Where queries are lanes, turning Q and O and
// waiting for their rows takes a fifth of a forward over 77 keys; this way takes 2-4 % less at D = 64 and 80, 7-12 %
// less at D = 128 and 160 on Zen 5, though it multiplies 80 keys.
#pragma once
#include "attention_rows_tile.h"
#include "attention_tiles.h"
#include "common/parallel.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Vectors of lanes in nearly equal panels. A tile of accumulators is so many rows by the vectors of a panel: it fills
// the registers, and what is loaded is used several times.
struct LanePanels {
  static constexpr int kMost = kVectorBytes == 64 ? 5 : 3;
  int64_t vectors, count;
  explicit LanePanels(int64_t n) : vectors(ceil_div(n, kLanes<float>)), count(ceil_div(vectors, kMost)) {}
  int64_t first(int64_t i) const { return i * vectors / count; }
  int64_t of(int64_t i) const { return first(i + 1) - first(i); }
  static constexpr int64_t tile_rows(int64_t vectors_of_panel) {
    constexpr int wide[] = {12, 12, 8, 6, 5}, narrow[] = {6, 6, 4, 4, 4};
    return (kVectorBytes == 64 ? wide : narrow)[vectors_of_panel - 1];
  }
  // Calls f.template operator()<V>() for the vectors of a panel.
  template <class F, int V = kMost>
  static INLINE void dispatch(int64_t vectors_of_panel, const F& f) {
    if constexpr (V > 1)
      if (vectors_of_panel < V) return dispatch<F, V - 1>(vectors_of_panel, f);
    f.template operator()<V>();
  }
};

// Rows of elements or of keys: as they lie in a tensor, or where scores and what is packed lie.
struct StridedRows {
  int64_t kRow;
  static constexpr int kStep = 1, kChunk = kLanes<float>;
};
struct PackedRows {
  static constexpr int kMost = 512, kRow = kMost + 16, kStep = 1, kChunk = kLanes<float>;
};

// s[R rows][V vectors] = scale * Q K^T, masked: rows are queries from r0 of the mask, lanes keys from k0. top becomes
// the largest in each lane of itself and the scores of its row.
template <int V, class Rows>
void score_rows(const float* q, Rows rows, const float* k, int64_t steps, float scale, const MaskOfKeys& mask,
                int64_t r0, int64_t k0, float* s, Vec<float>* top) {
  constexpr int L = kLanes<float>, R = LanePanels::tile_rows(V);
  Vec<float> acc[R][V];
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(6) for (int v = 0; v < V; ++v) acc[r][v] = Vec<float>{};
  accumulate<FloatDot, Rows>(q, k, steps, acc, Nothing{}, rows);
  mask.dispatch<V>(r0, k0, scale, [&](const auto& masked) __attribute__((always_inline)) {
    UNROLL(12)
    for (int r = 0; r < R; ++r) {
      Vec<float> largest = top[r];
      UNROLL(6)
      for (int v = 0; v < V; ++v) {
        const Vec<float> score = masked(acc[r][v], r, v);
        store(s + r * PackedRows::kRow + v * L, score);
        largest = larger(largest, score);
      }
      top[r] = largest;
    }
  });
}

// out[n rows][V vectors] = factor[row] * P V, of the last vector `rest` elements.
template <int V>
void value_rows(const float* p, const float* values, int64_t steps, const float* factor, int64_t n, float* out,
                int64_t out_stride, int64_t rest) {
  constexpr int L = kLanes<float>, R = LanePanels::tile_rows(V);
  Vec<float> acc[R][V];
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(6) for (int v = 0; v < V; ++v) acc[r][v] = Vec<float>{};
  accumulate<FloatDot, PackedRows>(p, values, steps, acc);
  UNROLL(12)
  for (int r = 0; r < R; ++r) {
    if (r >= n) break;
    UNROLL(6) for (int v = 0; v < V - 1; ++v) store(out + v * L, acc[r][v] * factor[r]);
    store(out + (V - 1) * L, acc[r][V - 1] * factor[r], rest);
    out += out_stride;
  }
}

class AttentionOverFewKeys {
  static constexpr int L = kLanes<float>;
  static constexpr int64_t kRow = PackedRows::kRow, kMostTile = 60, kMostTileRows = 12;
  static constexpr int64_t kTileRoom =
      kMostTile + 16;  // a last tile of rows, or a last vector of them, may end past it
  static constexpr int64_t kMostKeys = 160, kQueries = 4096, kFewestQueries = 128;  // of a block

  const AttentionParams& p;
  const AttentionRows &q_rows, &k_rows;
  const LanePanels key_panels, dim_panels;
  const int64_t tile;  // queries whose scores are weighed together
  int64_t query_block;
  const float scale;  // of scores, in units of log2

  struct Scratch {
    float* k;     // [panel of keys][element][its vectors]
    float* v;     // [panel of head_dim][key][its vectors]
    float* q;     // [kMostTileRows][kRow]
    float* s;     // [tile][kRow]
    float* rows;  // [row][head_dim]: of q or k, normalised and rotated, where they are

    explicit Scratch(const AttentionOverFewKeys& a) {
      const int64_t k_size = a.key_panels.vectors * L * a.p.head_dim, v_size = a.dim_panels.vectors * L * a.p.k_len;
      const int64_t rows_size = a.q_rows.any() || a.k_rows.any() ? max(a.tile, a.p.k_len) * a.p.head_dim : 0;
      k = static_cast<float*>(
          workspace((k_size + v_size + (kMostTileRows + kTileRoom) * kRow + rows_size) * sizeof(float)));
      v = k + k_size, q = v + v_size, s = q + kMostTileRows * kRow, rows = s + kTileRoom * kRow;
    }
  };

 public:
  AttentionOverFewKeys(const AttentionParams& p, const AttentionRows& q_rows, const AttentionRows& k_rows)
      : p(p),
        q_rows(q_rows),
        k_rows(k_rows),
        key_panels(p.k_len),
        dim_panels(p.head_dim),
        tile(whole_tiles()),
        query_block(min(kQueries, p.q_len)),
        scale(float(p.scale * kLog2e)) {
    while (query_block > kFewestQueries && num_threads() > 1 && items() < 4 * num_threads())
      query_block = round_up(query_block / 2, tile);
  }

  // Where lanes past the last key cost less than turning does.
  static bool takes(const AttentionParams& p) {
    return p.dtype == Dtype::f32 && MaskOfKeys::takes(p.mask) && !p.causal && p.k_len <= kMostKeys &&
           15 * round_up(p.k_len, L) <= 16 * p.k_len && p.head_dim % 16 == 0 && p.head_dim >= 64 && p.q_len >= 64;
  }

  void run() const {
    const int64_t n = items();
    parallel_claim(n, [&](const auto& claim) {
      const Scratch scratch(*this);
      for (int64_t item; (item = claim()) < n;)
        run_block(scratch, place(item), place(min(n - 1, item + num_threads())));
    });
  }

 private:
  int64_t items() const { return p.batch * p.heads * ceil_div(p.q_len, query_block); }

  // The least number of rows from about half of the most on of which every panel makes whole tiles, if there is one.
  int64_t whole_tiles() const {
    for (int64_t n = kMostTile * 2 / 5; n < kMostTile; ++n) {
      int64_t left = 0;
      for (const LanePanels* x : {&key_panels, &dim_panels})
        for (int64_t i = 0; i < x->count; ++i) left += n % LanePanels::tile_rows(x->of(i));
      if (left == 0) return n;
    }
    return kMostTile;
  }

  struct Place {
    int64_t b, h, first, kv_head;
  };
  Place place(int64_t item) const {
    const int64_t blocks = ceil_div(p.q_len, query_block), h = item / blocks % p.heads;
    return {item / blocks / p.heads, h, item % blocks * query_block, h / (p.heads / p.kv_heads)};
  }

  // Into how many tiles of accumulators the panels cut a tile of queries.
  int64_t parts_of_tile(const LanePanels& panels) const {
    int64_t parts = 0;
    for (int64_t i = 0; i < panels.count; ++i) parts += ceil_div(tile, LanePanels::tile_rows(panels.of(i)));
    return parts;
  }

  static RowsAt<float> rows_at(const AttentionInput& t, int64_t b, int64_t h, int64_t row) {
    return {row_of<float>(t, b, h, row), t.row_stride};
  }

  void run_block(const Scratch& w, const Place& here, const Place& next) const {
    const auto& [b, h, first, kv_head] = here;
    const int64_t end = min(p.q_len, first + query_block), tiles = ceil_div(end - first, tile);
    // What comes next is asked for beside both products: all of it beside the scores took 5-8 % longer.
    const int64_t score_asks = parts_of_tile(key_panels), value_asks = parts_of_tile(dim_panels);
    pack_keys(w, b, kv_head);
    const auto to_come = [&](const RowsAt<float>& x, int64_t n, int64_t parts) {
      return RowsToCome<const float>(x.p, x.stride, n, p.head_dim, parts);
    };
    auto next_k = to_come(rows_at(p.k, next.b, next.kv_head, 0), p.k_len, tiles * score_asks);
    auto next_v = to_come(rows_at(p.v, next.b, next.kv_head, 0), p.k_len, tiles * value_asks);
    for (int64_t query = first; query < end; query += tile) {
      const int64_t n = min(tile, end - query), then = query + n;
      auto next_q =
          then < end ? to_come(rows_at(p.q, b, h, then), min(tile, end - then), value_asks)
                     : to_come(rows_at(p.q, next.b, next.h, next.first), min(tile, p.q_len - next.first), value_asks);
      RowsToCome<float> out(row_of<float>(p.out, b, h, query), p.out.row_stride, n, p.head_dim, score_asks);
      const RowsAt<float> q = prepare(q_rows, rows_at(p.q, b, h, query), n, p.head_dim, b, h, query, w.rows);
      Vec<float> tops[kTileRoom];
      float factor[kTileRoom];
      const MaskOfKeys mask(p, b, h, query, n);
      score(w, q, n, mask, tops, [&] { out.ask(), next_k.ask(); });
      weigh(w.s, n, tops, static_cast<float*>(p.lse) + (b * p.heads + h) * p.q_len + query, factor);
      sum_values(w, n, factor, row_of<float>(p.out, b, h, query), [&] { next_q.ask(), next_v.ask(); });
    }
  }

  void pack_keys(const Scratch& w, int64_t b, int64_t kv_head) const {
    const RowsAt<float> k = prepare(k_rows, rows_at(p.k, b, kv_head, 0), p.k_len, p.head_dim, b, kv_head, 0, w.rows);
    const RowsAt<float> v = rows_at(p.v, b, kv_head, 0);
    for (int64_t i = 0; i < key_panels.count; ++i)
      for (int64_t j = 0; j < key_panels.of(i); ++j) {
        const int64_t k0 = (key_panels.first(i) + j) * L;
        pack_lanes<FloatDot, 1>(k.p + k0 * k.stride, k.stride, p.k_len - k0, p.head_dim,
                                w.k + key_panels.first(i) * L * p.head_dim + j * L, key_panels.of(i) * L);
      }
    for (int64_t i = 0; i < dim_panels.count; ++i)
      pack_panel<FloatDot>(v.p, v.stride, p.k_len, p.head_dim, dim_panels.first(i) * L, dim_panels.of(i), p.k_len,
                           w.v + dim_panels.first(i) * L * p.k_len);
  }

  // Queries as they lie; those of tiles that end past the last one are packed, since whole tiles are read.
  template <class BesideTile>
  void score(const Scratch& w, const RowsAt<float>& q, int64_t n, const MaskOfKeys& mask, Vec<float>* tops,
             const BesideTile& beside_tile) const {
    for (int64_t r = 0; r < kTileRoom; ++r) tops[r] = broadcast(-kInfinity<float>);
    for (int64_t i = 0; i < key_panels.count; ++i)
      LanePanels::dispatch(key_panels.of(i), [&]<int V>() {
        constexpr int64_t R = LanePanels::tile_rows(V);
        const int64_t k0 = key_panels.first(i) * L;
        const float* const k = w.k + k0 * p.head_dim;
        int64_t r = 0;
        for (; r + R <= n; r += R) {
          beside_tile();
          score_rows<V>(q.p + r * q.stride, StridedRows{q.stride}, k, p.head_dim, scale, mask, r, k0,
                        w.s + r * kRow + k0, tops + r);
        }
        if (r == n) return;
        for (int64_t j = r; j < n; ++j)
          std::memcpy(w.q + (j - r) * kRow, q.p + j * q.stride, p.head_dim * sizeof(float));
        score_rows<V>(w.q, PackedRows{}, k, p.head_dim, scale, mask, r, k0, w.s + r * kRow + k0, tops + r);
      });
  }

  static INLINE Bits<float> sees_nothing(Vec<float> top) { return top == -kInfinity<float>; }

  // Scores of n queries become P, less its division by the sums, which goes to factor.
  void weigh(float* s, int64_t n, Vec<float>* tops, float* lse, float* factor) const {
    Vec<float> sums[kTileRoom];
    float base[kTileRoom];
    for (int64_t r = 0; r < n; r += L) {
      tops[r] = across_lanes<float>(tops + r, [](Vec<float> a, Vec<float> b) { return larger(a, b); });
      store(base + r, sees_nothing(tops[r]) ? Vec<float>{} : tops[r]);
    }
    for (int64_t r = 0; r < n; ++r) sums[r] = exponentials(s + r * kRow, base[r]);
    for (int64_t r = n; r % L; ++r) sums[r] = Vec<float>{};
    for (int64_t r = 0; r < n; r += L) {
      const Vec<float> sum = across_lanes<float>(sums + r, [](Vec<float> a, Vec<float> b) { return a + b; });
      const Bits<float> nothing = sees_nothing(tops[r]);
      store(factor + r, nothing ? Vec<float>{} : 1.0f / sum);
      store(lse + r, nothing ? tops[r] : tops[r] * float(kLn2) + log(sum), n - r);
    }
  }

  // 2^(s - base) of a row of scores in place; returns their sums by lane.
  INLINE Vec<float> exponentials(float* s, float base) const {
    Vec<float> total{};
    for (int64_t k = 0; k < p.k_len; k += L) {
      const Vec<float> e = exp2_of_negative(load(s + k) - base);
      store(s + k, e);
      total += e;
    }
    return total;
  }

  template <class BesideTile>
  void sum_values(const Scratch& w, int64_t n, const float* factor, float* out, const BesideTile& beside_tile) const {
    for (int64_t i = 0; i < dim_panels.count; ++i)
      LanePanels::dispatch(dim_panels.of(i), [&]<int V>() {
        const int64_t d = dim_panels.first(i) * L, rest = p.head_dim - d - (V - 1) * L;
        for (int64_t r = 0; r < n; r += LanePanels::tile_rows(V)) {
          beside_tile();
          value_rows<V>(w.s + r * kRow, w.v + d * p.k_len, p.k_len, factor + r, n - r, out + r * p.out.row_stride + d,
                        p.out.row_stride, rest);
        }
      });
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
