// The gradients of attention: dq, dk and dv in one sweep, dmask in another where it is asked for.
#include "attention_backward.h"
#include "attention_backward_tiles.h"
#include "common/parallel.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// dq, dk and dv. One thread makes dk and dv of a part of the keys of a head: it packs them once, and goes once over all
// queries.
template <class S>
class AttentionGradients : AttentionBackward<S> {
  using Base = AttentionBackward<S>;
  static_assert(kMostSeenKeys % Base::kKeys == 0);
  using Base::L, Base::kPanel, Base::kKeys, Base::kQueries, Base::p, Base::steps, Base::chunks;
  using typename Base::E, typename Base::T, typename Base::Queries, typename Base::Keys, typename Base::Weight;

  const int64_t width, parts;  // of a row of dk and dv: head_dim in whole vectors
  const int64_t steps_size;    // of a block of k_steps
  const int64_t seen_runs;     // of keys of a part whose bits are kept, because heads share the mask; or 0
  T* const dq_parts;           // [part][B, H, Lq, D] where there are several

  struct Scratch {
    Queries q;
    Keys keys;
    T *q_rows, *grad_rows;      // [panel of head_dim][step of queries][its vectors]
    T* k_steps;                 // [block of keys][group of head_dim][step of keys][elements of the group]
    T* dq;                      // [panel of queries][head_dim][kPanel]
    T *dk, *dv;                 // [key of the part][width]
    Weight *weights, *dscores;  // [key][kQueries]
    T* ones;                    // [kPanel]
    SeenBits* seen;             // [block of queries][run of keys][panel][kSeenOfPanel]
    // The mask and the part of the keys whose bits these are.
    int64_t seen_mask, seen_part = -1;

    Scratch(typename Base::Carver carver, const AttentionGradients& a, int64_t keys_of_part)
        : q(carver, a.steps),
          keys(carver, a.chunks, blocks_of(keys_of_part)),
          q_rows(carver.take(kQueries * a.width)),
          grad_rows(carver.take(kQueries * a.width)),
          k_steps(carver.take(blocks_of(keys_of_part) * a.steps_size)),
          dq(carver.take(kQueries * a.p.head_dim)),
          dk(carver.take(keys_of_part * a.width)),
          dv(carver.take(keys_of_part * a.width)),
          weights(reinterpret_cast<Weight*>(carver.take((kKeys + 1) * kQueries))),
          dscores(reinterpret_cast<Weight*>(carver.take((kKeys + 1) * kQueries))),
          ones(carver.take(kPanel)),
          seen(reinterpret_cast<SeenBits*>(carver.take(a.seen_elements()))) {
      for (int i = 0; i < kPanel; ++i) ones[i] = 1;
    }
  };

 public:
  AttentionGradients(const AttentionParams& p, void* dq_parts)
      : Base(p),
        width(round_up(p.head_dim, L)),
        parts(attention_backward_parts(p)),
        steps_size(round_up(kKeys * p.head_dim + L, L)),
        seen_runs(kept_runs(p, ceil_div(p.k_len, parts))),
        dq_parts(static_cast<T*>(dq_parts)) {}

  void run() const {
    const int64_t longest = ceil_div(p.k_len, parts), items = p.batch * p.kv_heads * parts;
    const int64_t blocks = blocks_of(longest);
    const int64_t elements = Base::scratch_elements(steps, chunks, blocks) + 2 * kQueries * width +
                             blocks * steps_size + kQueries * p.head_dim + 2 * longest * width +
                             2 * (kKeys + 1) * kQueries + seen_elements() + 256;
    parallel_claim(items, [&](const auto& claim) {
      Scratch w({static_cast<T*>(workspace(elements * sizeof(T)))}, *this, longest);
      for (int64_t item; (item = claim()) < items;) {
        const int64_t head = item % (p.batch * p.kv_heads);
        run_part(w, head / p.kv_heads, head % p.kv_heads, item / (p.batch * p.kv_heads));
      }
    });
    if (parts > 1) sum_parts();
  }

 private:
  static int64_t blocks_of(int64_t keys) { return ceil_div(keys, kKeys); }

  // Heads take turns before a part of the keys: each thread makes the bits of a mask that they share once, while they
  // are few. Made by every head, those of 4096 x 4096 took 12-16 % of a backward in bf16 at D = 40.
  static constexpr int64_t kSeenBytes = 4 << 20, kSeenOfBlock = Base::kPanels * kSeenOfPanel;
  static int64_t kept_runs(const AttentionParams& p, int64_t keys_of_part) {
    const AttentionMask& m = p.mask;
    const bool shared = m.head_stride == 0 && (p.heads > 1 || (p.batch > 1 && m.batch_stride == 0));
    const int64_t runs = ceil_div(keys_of_part, kMostSeenKeys);
    const int64_t bytes = ceil_div(p.q_len, kQueries) * runs * kSeenOfBlock * int64_t(sizeof(SeenBits));
    return m.kind == AttentionMaskKind::boolean && shared && bytes <= kSeenBytes ? runs : 0;
  }
  int64_t seen_elements() const {
    return ceil_div(p.q_len, kQueries) * seen_runs * kSeenOfBlock * int64_t(sizeof(SeenBits)) / int64_t(sizeof(T));
  }

  void run_part(Scratch& w, int64_t b, int64_t kv_head, int64_t part) const {
    const int64_t begin = part * p.k_len / parts, end = (part + 1) * p.k_len / parts;
    std::memset(w.dk, 0, (end - begin) * width * sizeof(T));
    std::memset(w.dv, 0, (end - begin) * width * sizeof(T));
    for (int64_t k0 = begin, block = 0; k0 < end; k0 += kKeys, ++block) {
      Base::load_keys(w.keys, block, b, kv_head, k0, min(kKeys, end - k0));
      pack_steps<E>(row_of<S>(p.k, b, kv_head, k0), p.k.row_stride, w.keys.n, p.head_dim,
                    w.k_steps + block * steps_size);
    }
    const int64_t heads = p.heads / p.kv_heads;
    for (int64_t h = kv_head * heads; h < (kv_head + 1) * heads; ++h) {
      const int64_t mask = b * p.mask.batch_stride + h * p.mask.head_stride;
      const bool sees = part == w.seen_part && mask == w.seen_mask;
      for (int64_t first = 0; first < p.q_len; first += kQueries) {
        Base::load_queries(w.q, b, h, first);
        pack_panels(row_of<S>(p.q, b, h, first), p.q.row_stride, w.q, w.q_rows);
        pack_panels(row_of<S>(p.grad, b, h, first), p.grad.row_stride, w.q, w.grad_rows);
        std::memset(w.dq, 0, kQueries * p.head_dim * sizeof(T));
        for (int64_t k0 = begin, block = 0; k0 < end && Base::seen(first, w.q.n, k0); k0 += kKeys, ++block) {
          w.keys.select(block, k0, min(kKeys, end - k0));
          if (seen_runs && !sees && (k0 - begin) % kMostSeenKeys == 0) see_run(w, k0 - begin, end);
          run_block(w, k0 - begin, w.k_steps + block * steps_size);
        }
        store_dq(w, part);
      }
      w.seen_mask = mask, w.seen_part = part;
    }
    store_rows(w.dk, begin, end, T(p.scale), p.dk, b, kv_head);
    store_rows(w.dv, begin, end, T(1), p.dv, b, kv_head);
  }

  // The kept bits of a panel and the keys from `row` of the part.
  SeenBits* seen_at(const Scratch& w, int64_t panel, int64_t row) const {
    const int64_t run = w.q.first / kQueries * seen_runs + row / kMostSeenKeys;
    return w.seen + run * kSeenOfBlock + panel * kSeenOfPanel + row % kMostSeenKeys;
  }
  void see_run(const Scratch& w, int64_t row, int64_t end) const {
    const int64_t n = min<int64_t>(kMostSeenKeys, end - w.keys.first);
    for (int64_t panel = 0; panel < w.q.panels; ++panel)
      Base::mask_of(w.q, panel).see(w.keys.first, n, seen_at(w, panel, row));
  }

  void run_block(const Scratch& w, int64_t row, const T* k_steps) const {
    const int64_t key_steps = steps_of<E>(w.keys.n), query_steps = w.q.panels * kPanel / E::kPair;
    const RowGroups parts_of_dim(p.head_dim), groups(w.keys.n);
    for (int64_t panel = 0; panel < w.q.panels; ++panel) {
      SeenBits bits[kSeenOfPanel];
      const SeenBits* const seen = seen_runs ? seen_at(w, panel, row) : Base::see(w.q, panel, w.keys, bits);
      Base::score_gradients(w.q, panel, w.keys, seen, [&](int64_t key, int v, Vec<T> weight, Vec<T> ds) {
        store(w.weights + key * kQueries + panel * kPanel + v * L, weight);
        store(w.dscores + key * kQueries + panel * kPanel + v * L, ds);
      });
      T* dq = w.dq + panel * p.head_dim * kPanel;
      for (int64_t g = 0; g < parts_of_dim.count; ++g)
        value_tile_for_rows<E, 2>(parts_of_dim.rows(g))(k_steps + parts_of_dim.first(g) * key_steps, w.keys.ds,
                                                        key_steps, dq + parts_of_dim.first(g) * kPanel, w.ones);
    }
    for (int64_t d = 0; d < width; d += kPanel) {
      const bool wide = width - d > L;
      for (int64_t g = 0; g < groups.count; ++g) {
        const auto tile = wide ? gradient_tile_for_rows<2>(groups.rows(g)) : gradient_tile_for_rows<1>(groups.rows(g));
        const int64_t to = (row + groups.first(g)) * width + d, from = groups.first(g) * kQueries;
        const int64_t panel = d * kQueries / E::kPair;
        tile(reinterpret_cast<const T*>(w.weights + from), w.grad_rows + panel, query_steps, w.dv + to, width);
        tile(reinterpret_cast<const T*>(w.dscores + from), w.q_rows + panel, query_steps, w.dk + to, width);
      }
    }
  }

  // out[R keys][V vectors of head_dim] += weights^T rows, over queries.
  template <int V, int R>
  static void gradient_tile(const T* weights, const T* rows, int64_t steps, T* out, int64_t row_stride) {
    Vec<T> acc[R][V];
    UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
    accumulate<E, typename Base::WeightRows>(weights, rows, steps, acc);
    UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) {
      T* to = out + r * row_stride + v * L;
      store(to, load(to) + acc[r][v]);
    }
  }
  template <int V, int R = kRows>
  static INLINE auto gradient_tile_for_rows(int64_t rows) {
    if constexpr (R > 1)
      if (rows < R) return gradient_tile_for_rows<V, R - 1>(rows);
    return &gradient_tile<V, R>;
  }

  void pack_panels(const S* x, int64_t row_stride, const Queries& q, T* to) const {
    for (int64_t d = 0; d < width; d += kPanel, to += kQueries / E::kPair * kPanel)
      pack_panel<E>(x, row_stride, q.n, p.head_dim, d, width - d > L ? 2 : 1, q.panels * kPanel / E::kPair, to);
  }

  void store_dq(const Scratch& w, int64_t part) const {
    const T factor = parts > 1 ? T(1) : T(p.scale);
    const Vec<T> factors[2] = {broadcast(factor), broadcast(factor)};
    for (int64_t panel = 0; panel < w.q.panels; ++panel) {
      const T* dq = w.dq + panel * p.head_dim * kPanel;
      const int64_t query = w.q.first + panel * kPanel, n = min<int64_t>(kPanel, p.q_len - query);
      if (parts > 1)
        store_lanes<2>(dq, factors, n, p.head_dim,
                       dq_parts + (((part * p.batch + w.q.b) * p.heads + w.q.h) * p.q_len + query) * p.head_dim,
                       p.head_dim);
      else
        store_lanes<2>(dq, factors, n, p.head_dim, row_of<S>(p.dq, w.q.b, w.q.h, query), p.dq.row_stride);
    }
  }

  void store_rows(const T* rows, int64_t begin, int64_t end, T factor, const AttentionOutput& to, int64_t b,
                  int64_t h) const {
    for (int64_t k = begin; k < end; ++k, rows += width)
      for (int64_t d = 0; d < p.head_dim; d += L)
        store(row_of<S>(to, b, h, k) + d, load(rows + d) * factor, p.head_dim - d);
  }

  void sum_parts() const {
    const int64_t rows = p.batch * p.heads * p.q_len;
    parallel_for(rows, 64, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        for (int64_t d = 0; d < p.head_dim; d += L) {
          Vec<T> total{};
          for (int64_t part = 0; part < parts; ++part)
            total += load(dq_parts + (part * rows + row) * p.head_dim + d, p.head_dim - d);
          const int64_t head = row / p.q_len;
          store(row_of<S>(p.dq, head / p.heads, head % p.heads, row % p.q_len) + d, total * T(p.scale), p.head_dim - d);
        }
    });
  }
};

// dmask: each block of its own elements sums what it was broadcast to. That S and dP are made a second time costs two
// products of seven, and leaves no sum to the order in which threads finish.
template <class S>
class AttentionMaskGradient : AttentionBackward<S> {
  using Base = AttentionBackward<S>;
  using Base::L, Base::kPanel, Base::kKeys, Base::kQueries, Base::p, Base::steps, Base::chunks;
  using typename Base::T, typename Base::Queries, typename Base::Keys;

  // An axis of the scores: cut into blocks that the mask tells apart, or summed whole.
  struct Axis {
    int64_t size, block, items;
    Axis(int64_t size, int64_t block, bool broadcast)
        : size(size), block(block), items(broadcast ? 1 : ceil_div(size, block)) {}
    int64_t begin(int64_t item) const { return items == 1 ? 0 : item * block; }
    int64_t end(int64_t item) const { return items == 1 ? size : min(size, (item + 1) * block); }
  };

 public:
  explicit AttentionMaskGradient(const AttentionParams& p) : Base(p) {}

  void run() const {
    const AttentionMask& m = p.mask;
    const Axis batch(p.batch, 1, m.batch_stride == 0), heads(p.heads, 1, m.head_stride == 0);
    const Axis queries(p.q_len, kQueries, m.q_stride == 0), keys(p.k_len, kKeys, m.k_stride == 0);
    const int64_t items = batch.items * heads.items * queries.items * keys.items;
    const int64_t elements = Base::scratch_elements(steps, chunks, 1) + (kKeys + 1) * kQueries + 256;
    parallel_claim(items, [&](const auto& claim) {
      typename Base::Carver carver{static_cast<T*>(workspace(elements * sizeof(T)))};
      Queries q(carver, steps);
      Keys k(carver, chunks, 1);
      T* sums = carver.take((kKeys + 1) * kQueries);  // [key][kQueries]
      for (int64_t item; (item = claim()) < items;) {
        const int64_t ik = item % keys.items, iq = item / keys.items % queries.items;
        const int64_t ih = item / (keys.items * queries.items) % heads.items;
        const int64_t ib = item / (keys.items * queries.items * heads.items);
        std::memset(sums, 0, (kKeys + 1) * kQueries * sizeof(T));
        for (int64_t b = batch.begin(ib); b < batch.end(ib); ++b)
          for (int64_t h = heads.begin(ih); h < heads.end(ih); ++h)
            for (int64_t first = queries.begin(iq); first < queries.end(iq); first += kQueries) {
              Base::load_queries(q, b, h, first);
              for (int64_t k0 = keys.begin(ik); k0 < keys.end(ik) && Base::seen(first, q.n, k0); k0 += kKeys) {
                Base::load_keys(k, 0, b, h / (p.heads / p.kv_heads), k0, min(kKeys, keys.size - k0));
                add(q, k, sums);
              }
            }
        const int64_t row = (ib * heads.items + ih) * (m.q_stride == 0 ? 1 : queries.size);
        store_sums(sums, row, queries, iq, keys, ik);
      }
    });
  }

 private:
  void add(const Queries& q, const Keys& k, T* sums) const {
    for (int64_t panel = 0; panel < q.panels; ++panel) {
      SeenBits bits[kSeenOfPanel];
      Base::score_gradients(q, panel, k, Base::see(q, panel, k, bits), [&](int64_t key, int v, Vec<T>, Vec<T> ds) {
        T* to = sums + key * kQueries + panel * kPanel + v * L;
        store(to, load(to) + ds);
      });
    }
  }

  // The sums of this item, and over the axes the mask does not have, to dmask[row of the first query][key].
  void store_sums(const T* sums, int64_t row, const Axis& queries, int64_t iq, const Axis& keys, int64_t ik) const {
    const bool every_query = p.mask.q_stride != 0, every_key = p.mask.k_stride != 0;
    const int64_t n_queries = every_query ? queries.end(iq) - queries.begin(iq) : 1;
    const int64_t n_keys = every_key ? keys.end(ik) - keys.begin(ik) : 1;
    for (int64_t i = 0; i < n_queries; ++i)
      for (int64_t j = 0; j < n_keys; ++j) {
        T total = 0;
        for (int64_t k = every_key ? j : 0; k < (every_key ? j + 1 : kKeys); ++k)
          for (int64_t q = every_query ? i : 0; q < (every_query ? i + 1 : kQueries); ++q)
            total += sums[k * kQueries + q];
        const int64_t q = every_query ? queries.begin(iq) + i : 0, k = every_key ? keys.begin(ik) + j : 0;
        put((row + q) * (every_key ? keys.size : 1) + k, total);
      }
  }

  void put(int64_t i, T value) const {
    switch (p.mask.dtype) {
      case Dtype::f64: static_cast<double*>(p.dmask)[i] = value; break;
      case Dtype::f32: static_cast<float*>(p.dmask)[i] = float(value); break;
      case Dtype::bf16: static_cast<bf16*>(p.dmask)[i] = from_compute<bf16>(float(value)); break;
      case Dtype::f16: static_cast<fp16*>(p.dmask)[i] = from_compute<fp16>(float(value)); break;
    }
  }
};

}  // namespace

void attention_backward_kernel(const AttentionParams& p, void* dq_parts) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    AttentionGradients<S>(p, dq_parts).run();
    if (p.dmask) AttentionMaskGradient<S>(p).run();
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
