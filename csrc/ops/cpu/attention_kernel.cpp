#include "attention_few_keys.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Panels of a block of queries take turns before a block of keys, whose K and V are packed once for all of them and
// stay in the second-level cache; the scores of one panel and one block of keys stay in the first-level one. Q^T and
// O^T of a panel are read and written once per block of keys, about a byte a cycle, which any cache keeps up with: a
// block of queries is as long as the threads allow.
template <class S>
class AttentionForward {
  using E = typename DotOf<S>::type;
  using T = typename E::T;
  static constexpr int L = kLanes<T>, kPanel = 2 * L;
  static constexpr int64_t kKeys = kMostKeys, kKeyBytes = 512 << 10;            // of a block, K and V together
  static constexpr int64_t kQueries = 2048, kQueryElements = int64_t{1} << 19;  // while the threads have enough to do
  static constexpr int64_t kSeenBytes = 2 << 20;  // what a mask lets a block of queries see of all keys

  const AttentionParams& p;
  const AttentionRows &q_rows, &k_rows;
  const int64_t steps, chunks, key_block, seen_keys, seen_runs;
  int64_t query_block;
  const T scale;  // of scores, in units of log2

 public:
  AttentionForward(const AttentionParams& p, const AttentionRows& q_rows, const AttentionRows& k_rows)
      : p(p),
        q_rows(q_rows),
        k_rows(k_rows),
        steps(steps_of<E>(p.head_dim)),
        chunks(ceil_div(steps, L)),
        key_block(key_block_for(p.k_len, p.head_dim)),
        seen_keys(kMostSeenKeys / key_block * key_block),
        seen_runs(is_masked() ? max<int64_t>(1, ceil_div(p.k_len, seen_keys)) : p.causal),
        scale(T(p.scale * kLog2e)) {
    int64_t panels = min(kQueries, kQueryElements / p.head_dim) / kPanel;
    if (is_masked()) panels = min(panels, kSeenBytes / (seen_runs * kSeenOfPanel * int64_t(sizeof(SeenBits))));
    const int64_t most = max<int64_t>(1, panels) * kPanel;
    query_block = min(most, round_up(p.q_len, kPanel));
    while (query_block > 2 * kPanel && num_threads() > 1 && items() < 4 * num_threads())
      query_block = round_up(query_block / 2, kPanel);
  }

  void run() const {
    const int64_t n = items();
    parallel_claim(n, [&](const auto& claim) {
      const Scratch scratch(*this);
      int64_t seen_from = -1, seen_mask = 0;  // of which scratch holds the bits
      for (int64_t item; (item = claim()) < n;) {
        const Place here = place(item), next = place(min(n - 1, item + num_threads()));  // most likely
        const int64_t mask = here.b * p.mask.batch_stride + here.h * p.mask.head_stride;
        run_block(scratch, here, next, is_masked() && here.first == seen_from && mask == seen_mask);
        seen_from = here.first, seen_mask = mask;
      }
    });
  }

 private:
  bool is_masked() const { return p.mask.kind == AttentionMaskKind::boolean; }
  int64_t items() const { return p.batch * p.heads * ceil_div(p.q_len, query_block); }

  // Keys are cut into equal blocks of whole groups; few keys are one block.
  static int64_t key_block_for(int64_t keys, int64_t head_dim) {
    const int64_t fitting = kKeyBytes / (2 * int64_t(sizeof(T)) / E::kPair * head_dim) / kRows * kRows;
    const int64_t blocks = max<int64_t>(1, ceil_div(keys, max<int64_t>(kRows, min(kKeys, fitting))));
    return blocks == 1 ? max<int64_t>(1, keys) : round_up(ceil_div(keys, blocks), kRows);
  }

  struct Scratch {
    int64_t q_stride, o_stride;  // from panel to panel
    T* k;                        // [group][chunk][kRows][L]
    T* v;                        // [group of head_dim][step][elements of the group]
    T* s;                        // [key][kPanel]
    T* alpha;                    // [kPanel]
    T* top;                      // [panel][kPanel]: the largest scores so far
    T* sum;                      // [panel][kPanel]
    T* q;                        // [panel][step][kPanel]
    T* o;                        // [panel][head_dim][kPanel]
    S* rows;                     // [row][head_dim]: of q or k, normalised and rotated, where they are
    SeenBits* seen;              // [run of blocks of keys][panel][kSeenOfPanel]; without a mask of the last run alone

    explicit Scratch(const AttentionForward& a) {
      const int64_t panels = a.query_block / kPanel, keys = round_up(a.key_block, 2);
      const int64_t seen_stride = kSeenOfPanel * sizeof(SeenBits) / sizeof(T);
      q_stride = a.steps * kPanel, o_stride = a.p.head_dim * kPanel;
      const int64_t sizes[] = {ceil_div(a.key_block, kRows) * a.chunks * kRows * L,
                               round_up(steps_of<E>(a.key_block) * a.p.head_dim + L, L),
                               keys * kPanel,
                               kPanel,
                               panels * kPanel,
                               panels * kPanel,
                               panels * q_stride,
                               panels * o_stride,
                               a.q_rows.any() || a.k_rows.any() ? max<int64_t>(kPanel, keys) * a.p.head_dim : 0,
                               a.seen_runs * panels * seen_stride};
      T *rows_at, *seen_at;
      T** const parts[] = {&k, &v, &s, &alpha, &top, &sum, &q, &o, &rows_at, &seen_at};
      int64_t total = 0;
      for (const int64_t size : sizes) total += size;
      T* at = static_cast<T*>(workspace(total * sizeof(T)));
      for (int i = 0; i < 10; at += sizes[i++]) *parts[i] = at;
      rows = reinterpret_cast<S*>(rows_at), seen = reinterpret_cast<SeenBits*>(seen_at);
    }
  };

  // A block of queries of a head. Heads take turns before a block: the bits of a mask that they share are made once by
  // each thread. Made by every head, they took 12 % of 8 heads of 4096 keys, most of it for reading 16 MB again.
  struct Place {
    int64_t b, h, first, kv_head;
  };
  Place place(int64_t item) const {
    const int64_t h = item % p.heads;
    return {item / p.heads % p.batch, h, item / (p.batch * p.heads) * query_block, h / (p.heads / p.kv_heads)};
  }

  // sees: the bits of what these queries see are there.
  void run_block(const Scratch& w, const Place& place, const Place& next, bool sees) const {
    const auto& [b, h, first, kv_head] = place;
    const int64_t n = min(query_block, p.q_len - first), panels = ceil_div(n, kPanel);
    const S* q = row_of<S>(p.q, b, h, first);
    const S* k = row_of<S>(p.k, b, kv_head, 0);
    const S* v = row_of<S>(p.v, b, kv_head, 0);
    const int64_t seen = max<int64_t>(0, ScoreMask<T, 1>(p, b, h, first + n - 1).end());  // by any query of the block
    int64_t k0 = 0;
    do {  // once at least: without keys the output is 0
      const int64_t keys = min(key_block, p.k_len - k0);
      const RowsAt<S> k_in =
          prepare<S>(k_rows, {k + k0 * p.k.row_stride, p.k.row_stride}, keys, p.head_dim, b, kv_head, k0, w.rows);
      pack_rows<E>(k_in.p, k_in.stride, keys, p.head_dim, w.k);
      pack_steps<E>(v + k0 * p.v.row_stride, p.v.row_stride, keys, p.head_dim, w.v);
      const bool last = k0 + keys >= seen;
      const int64_t next_k0 = last ? 0 : k0 + keys, next_keys = min(key_block, p.k_len - next_k0);
      const int64_t groups = RowGroups(keys).count, parts = RowGroups(p.head_dim).count;
      const auto& [next_b, next_h, next_first, next_kv_head] = last ? next : place;
      const auto next_rows = [&](const auto& x) {
        const S* const from = row_of<S>(x, next_b, next_kv_head, next_k0);
        return RowsToCome<const S>(from, x.row_stride, next_keys, p.head_dim, panels * groups);
      };
      RowsToCome<const S> next_k = next_rows(p.k), next_v = next_rows(p.v);
      for_panels(n, [&]<int V>(int64_t panel, int64_t rows) {
        const int64_t query = first + panel * kPanel, later = min(n, (panel + 1) * kPanel);
        RowsToCome<const S> next_q(q + later * p.q.row_stride, p.q.row_stride,
                                   k0 == 0 ? min<int64_t>(kPanel, n - later) : 0, p.head_dim, groups);
        RowsToCome<S> out(row_of<S>(p.out, b, h, query), p.out.row_stride, last ? rows : 0, p.head_dim, parts);
        if (k0 == 0) begin<V>(w, panel, b, h, query, rows);
        const ScoreMask<T, V> mask(p, b, h, query), next_mask(p, b, h, query + kPanel);
        attend<V>(
            w, panel, mask, next_mask, k0, keys, sees, [&] { next_q.ask(), next_k.ask(), next_v.ask(); },
            [&] { out.ask(); });
        if (last) finish<V>(w, panel, b, h, query, rows);
      });
      k0 += keys;
    } while (k0 < seen);
  }

  template <int V>
  void begin(const Scratch& w, int64_t panel, int64_t b, int64_t h, int64_t query, int64_t rows) const {
    const RowsAt<S> q =
        prepare<S>(q_rows, {row_of<S>(p.q, b, h, query), p.q.row_stride}, rows, p.head_dim, b, h, query, w.rows);
    pack_lanes<E, V>(q.p, q.stride, rows, p.head_dim, w.q + panel * w.q_stride);
    for (int64_t i = 0; i < kPanel; ++i) w.top[panel * kPanel + i] = -kInfinity<T>, w.sum[panel * kPanel + i] = 0;
    if (p.k_len == 0 || (p.causal && p.k_len < p.q_len))  // some queries attend to nothing at all
      std::memset(w.o + panel * w.o_stride, 0, w.o_stride * sizeof(T));
  }

  // f<V>(panel, queries) for each panel of n queries; the last one may have a single vector.
  template <class F>
  static void for_panels(int64_t n, const F& f) {
    for (int64_t panel = 0; panel * kPanel < n; ++panel) {
      const int64_t rows = min<int64_t>(kPanel, n - panel * kPanel);
      rows > L ? f.template operator()<2>(panel, rows) : f.template operator()<1>(panel, rows);
    }
  }

  // One panel of queries against one block of keys; what is asked for beside scores and values comes next.
  template <int V, class BesideScores, class BesideValues>
  void attend(const Scratch& w, int64_t panel, const ScoreMask<T, V>& mask, const ScoreMask<T, V>& next_mask,
              int64_t k0, int64_t keys, bool sees, const BesideScores& beside_scores,
              const BesideValues& beside_values) const {
    T* top = w.top + panel * kPanel;
    T* o = w.o + panel * w.o_stride;
    const T* q = w.q + panel * w.q_stride;
    if (mask.end() <= k0) return;
    const int64_t in_run = k0 % seen_keys, run = min(seen_keys, p.k_len - k0 + in_run);
    const SeenBits* seen = nullptr;
    int64_t last = keys;  // keys past it are seen by none
    if (mask.hides(k0 - in_run, run)) {
      SeenBits* const bits = w.seen + (k0 / seen_keys % seen_runs * (query_block / kPanel) + panel) * kSeenOfPanel;
      if (in_run == 0 && !sees) mask.see(k0, run, bits);
      seen = bits + in_run;
      last = mask.last_seen(seen, keys);
      if (last == 0 && k0 > 0) return;
    }

    Vec<T> top_before[V], top_after[V], base[V], sum[V];
    for (int v = 0; v < V; ++v) top_before[v] = load(top + v * L);
    const RowGroups groups(keys);
    int64_t n = 0;  // keys scored: whole groups, until all that is seen is in
    for (int64_t g = 0; n == 0 || n < last; n = groups.first(++g)) {
      beside_scores();
      if (in_run == 0 && !sees) next_mask.prefetch(k0, run, g, groups.count);
      if (seen) mask.prefetch_seen(seen + kSeenOfPanel + groups.first(g + 1) - 1);
      score_tile_for_rows<E, V>(groups.rows(g))(w.k + g * chunks * kRows * L, q, steps, w.s + n * V * L, top,
                                                seen ? seen + n : nullptr);
    }

    T scale_left = scale;
    if (p.mask.kind == AttentionMaskKind::additive) {
      for (int v = 0; v < V; ++v) top_after[v] = top_before[v];
      mask.add(w.s, k0, n, scale, top_after);
      for (int v = 0; v < V; ++v) store(top + v * L, top_after[v]);
      scale_left = 1;
    }
    for (int v = 0; v < V; ++v) {
      const Vec<T> t = load(top + v * L);
      base[v] = select<T>(t == -kInfinity<T>, Vec<T>{}, t * scale_left);
      // Of what is already in sum and O; they begin as nothing.
      const Vec<T> alpha = exp2_of_negative(top_before[v] * scale_left - base[v]);
      store(w.alpha + v * L, alpha);
      sum[v] = load(w.sum + panel * kPanel + v * L) * alpha;
    }
    exponentials<E, V>(w.s, n, scale_left, base, sum);
    for (int v = 0; v < V; ++v) store(w.sum + panel * kPanel + v * L, sum[v]);

    const RowGroups parts(p.head_dim);
    const int64_t key_steps = steps_of<E>(keys);
    for (int64_t g = 0; g < parts.count; ++g) {
      beside_values();
      value_tile_for_rows<E, V>(parts.rows(g))(w.v + parts.first(g) * key_steps, w.s, steps_of<E>(n),
                                               o + parts.first(g) * V * L, k0 ? w.alpha : nullptr);
    }
  }

  template <int V>
  void finish(const Scratch& w, int64_t panel, int64_t b, int64_t h, int64_t query, int64_t rows) const {
    Vec<T> factor[V];
    const T units = p.mask.kind == AttentionMaskKind::additive ? T(kLn2) : T(p.scale);
    T* lse = static_cast<T*>(p.lse) + (b * p.heads + h) * p.q_len + query;
    for (int v = 0; v < V; ++v) {
      const Vec<T> sum = load(w.sum + panel * kPanel + v * L), top = load(w.top + panel * kPanel + v * L);
      const Bits<T> nothing = top == -kInfinity<T>;
      factor[v] = select<T>(nothing, Vec<T>{}, T(1) / sum);
      store(lse + v * L, select<T>(nothing, top, top * units + log(sum)), rows - v * L);
    }
    store_lanes<V>(w.o + panel * w.o_stride, factor, rows, p.head_dim, row_of<S>(p.out, b, h, query), p.out.row_stride);
  }
};

}  // namespace

void attention_kernel(const AttentionParams& p, const AttentionRows& q, const AttentionRows& k) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    if constexpr (std::is_same_v<S, float>)
      if (AttentionOverFewKeys::takes(p)) return AttentionOverFewKeys(p, q, k).run();
    AttentionForward<S>(p, q, k).run();
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
