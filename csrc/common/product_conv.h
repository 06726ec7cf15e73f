// Convolution by fewer products: transform, multiply, combine. An algorithm is a table of coefficients.
//
// In one dimension a tile reads kIn inputs, kStep apart from tile to tile and starting at kOffset, and writes kOut
// outputs:
//     data    = B x     kData sums of inputs
//     weights = G w     kWeights sums of the three weights, or four
//     m[p]    = data[kDataOf[p]] * weights[kWeightOf[p]]     kProducts products, each summed over the input channels
//     y       = A m
// In two dimensions every table is applied along rows and along columns.
#pragma once
#include <cstdint>

#include "product_conv_output.h"

namespace imagegen {

// w (cout, cin, k, k) of any strides -> [panel of 2 vectors of cout][weight][step of cin][2 vectors]
struct PackWeightParams {
  const void* w;
  int64_t w_stride[4];  // of cout, cin, kernel row, kernel column
  void* u;              // null to ask for its size alone
  Dtype dtype;
  int64_t cin, cout;
};

}  // namespace imagegen

#ifdef IMAGEGEN_CAPABILITY
#include "parallel.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Whether algorithms with large tiles, whose tables say kLarge, are there for this product. They take long to compile,
// and are not wanted of doubles, which are asked for their digits, nor of dots of bf16: so rounded the data of F(4,3)
// would err six times as much as that of F(2,3). Who is in a hurry on x86 has AVX2.
template <class E>
constexpr bool kLargeTiles = std::is_same_v<E, FloatDot>
#if defined(__x86_64__) && !defined(__AVX2__)
                             && false
#endif
    ;

template <class Alg, class E>
constexpr bool is_built() {
  if constexpr (requires { Alg::kLarge; }) return kLargeTiles<E>;
  return true;
}

// Multiplications that a pair of channels takes. Reading a weight from memory costs as much as multiplying by it for
// eight tiles, which counts where there are few.
template <class Alg>
int64_t cost(const ConvShape& s) {
  constexpr int64_t kReading = 8;
  const int64_t tiles = ceil_div(s.out_h, Alg::kOut) * ceil_div(s.out_w, Alg::kOut);
  return Alg::kProducts * Alg::kProducts * (tiles + kReading);
}

// Large tiles where they are there and waste little of the image.
template <class Small, class Large>
ConvAlgorithm choose_tiles(const ConvShape& s) {
  bool large = false;
  dispatch_dot(s.dtype, [&]<class E>() {
    if constexpr (is_built<Large, E>()) large = cost<Large>(s) < cost<Small>(s);
  });
  return large ? ConvAlgorithm::large_tiles : ConvAlgorithm::small_tiles;
}

// f.template operator()<Alg>() of the tables that were chosen.
template <class Small, class Large, class F>
INLINE auto with_tiles(ConvAlgorithm algorithm, const F& f) {
  return algorithm == ConvAlgorithm::large_tiles ? f.template operator()<Large>() : f.template operator()<Small>();
}

template <class Alg, class E>
int64_t packed_elements(int64_t cin, int64_t cout) {
  constexpr int kPanel = kPanelVectors * kLanes<typename E::T>;
  return ceil_div(cout, kPanel) * kPanel * Alg::kWeights * Alg::kWeights * ceil_div(cin, E::kPair);
}

template <class Alg, class E>
class ProductConv {
  using T = typename E::T;
  static constexpr int L = kLanes<T>, kPanel = kPanelVectors * L, kChunk = L * E::kPair;
  static constexpr int kIn = Alg::kIn, kOut = Alg::kOut, kData = Alg::kData, kProducts = Alg::kProducts;
  static constexpr int kWeights = Alg::kWeights;
  // Tiles that share each panel of weights while it is in cache. From 24 to 96 the time is the same within 2 %, at 12
  // it is up to 1.4x; few keep the transforms in the second-level cache and the memory small (1 MB at 512 channels).
  static constexpr int64_t kTiles = 24;
  static constexpr int64_t kUnit = L / 2;  // neighbouring tiles that begin and end with lines of a planar image
  using Transform = TileTransform<Alg, E>;

  const ProductConvParams& p;
  const TileGrid grid;
  const ImageView image;
  const int64_t tiles, steps, panels;

 public:
  explicit ProductConv(const ProductConvParams& p)
      : p(p),
        grid{ceil_div(p.out_h, kOut), ceil_div(p.out_w, kOut)},
        image(image_view(p)),
        tiles(p.batch * grid.rows * grid.cols),
        steps(ceil_div(p.cin, E::kPair)),
        panels(ceil_div(p.cout, kPanel)) {}

  // Threads share the tiles, or the output channels where the weights are by far the larger part to read: each thread
  // then transforms every tile, but keeps to its own weights and uses them for more tiles at a time.
  void run() const {
    const int64_t threads = num_threads();
    const bool few_tiles =
        panels >= threads && packed_elements<Alg, E>(p.cin, p.cout) > 4 * tiles * kData * kData * steps;
    const int64_t shares = few_tiles ? threads : 1;
    // Of tiles to share, four pieces or more for every thread: some are quicker than others.
    const int64_t most = few_tiles      ? 2 * kTiles
                         : threads == 1 ? kTiles
                                        : min(kTiles, max<int64_t>(kRows, tiles / (4 * threads)));
    // As many blocks for every thread, of nearly as many tiles: eleven of 24 kept one of two threads waiting for a
    // sixteenth of the time. Long ones begin where lines of the image do.
    const int64_t enough = ceil_div(tiles, most), unit = tiles >= 2 * kUnit * enough ? kUnit : 1;
    const int64_t units = ceil_div(tiles, unit);
    const int64_t blocks = few_tiles || enough < threads ? enough : min(units, round_up(enough, threads));
    const int64_t items = shares * blocks;
    const auto begin = [&](int64_t block) { return min(tiles, block * units / blocks * unit); };
    parallel_claim(items, [&](const auto& claim) {
      const Scratch scratch(*this, ceil_div(units, blocks) * unit);
      for (int64_t item; (item = claim()) < items;) {
        const int64_t share = item / blocks, first = begin(item % blocks);
        run_block(scratch, first, begin(item % blocks + 1) - first, share * panels / shares,
                  (share + 1) * panels / shares);
      }
      finish_streams();
    });
  }

 private:
  // One thread's memory for a block of tiles.
  struct Scratch {
    int64_t group_stride, plane_stride, product_stride;
    T* data;      // [kData * kData][group][chunk][kRows][L]
    T* products;  // [kProducts * kProducts][tile][kPanel]
    T* outputs;   // [kOut rows][column][kPanel]: planar output before it is turned
    void* transform;

    Scratch(const ProductConv& c, int64_t block) {
      group_stride = round_up(c.steps, L) * kRows;
      plane_stride = group_stride * RowGroups(block).count + L;  // + L: no two planes in the same cache set
      product_stride = block * kPanel;
      const int64_t n_data = plane_stride * kData * kData, n_products = product_stride * kProducts * kProducts;
      const int64_t n_outputs = kOut * kOut * block * kPanel;
      data = static_cast<T*>(
          workspace((n_data + n_products + n_outputs) * sizeof(T) + Transform::scratch_bytes(c.p.cin, block)));
      products = data + n_data;
      outputs = products + n_products;
      transform = outputs + n_outputs;
    }
  };

  void run_block(const Scratch& s, int64_t first, int64_t n, int64_t panel_begin, int64_t panel_end) const {
    const RowGroups groups(n);
    const auto data = [&](int64_t t) {
      const int64_t g = groups.of(t);
      return s.data + g * s.group_stride + (t - groups.first(g)) * L;
    };
    Transform(image, grid, s.transform, n).run(first, n, data, kRows * L, s.plane_stride);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t channels = min<int64_t>(kPanel, p.cout - panel * kPanel);
      channels > L ? multiply_panel<2>(s, first, groups, panel) : multiply_panel<1>(s, first, groups, panel);
      combine_panel(s, first, n, panel * kPanel, channels);
    }
  }

  // ---- multiply

  template <int V>
  void multiply_panel(const Scratch& s, int64_t first, const RowGroups& groups, int64_t panel) const {
    const int64_t weight_stride = steps * V * L;
    const T* u = static_cast<const T*>(p.u) + panel * kPanel * kWeights * kWeights * steps;
    const int lines = prefetch_lines(groups.count);
    for (int product = 0; product < kProducts * kProducts; ++product) {
      prefetch_residual(first, groups.n, product, panel);
      const int i = product / kProducts, j = product % kProducts;
      const T* weight = u + (Alg::kWeightOf[i] * kWeights + Alg::kWeightOf[j]) * weight_stride;
      const T* data = s.data + (Alg::kDataOf[i] * kData + Alg::kDataOf[j]) * s.plane_stride;
      for (int64_t g = 0; g < groups.count; ++g) {
        const Prefetch<T> prefetch{weight + weight_stride + g * lines * (steps / L) * (64 / int64_t{sizeof(T)}), lines};
        multiply_for_rows<E, V>(groups.rows(g))(data + g * s.group_stride, weight, steps,
                                                s.products + product * s.product_stride + groups.first(g) * kPanel,
                                                prefetch);
      }
    }
  }

  // Each product fetches a share of the residual of n tiles from `first` on, which else costs a wait for every line: a
  // quarter of the time of 128 channels.
  void prefetch_residual(int64_t first, int64_t n, int product, int64_t panel) const {
    if (!p.residual) return;
    constexpr int kShares = kProducts * kProducts;
    const int64_t c0 = panel * kPanel, channels = min<int64_t>(kPanel, p.cout - c0);
    for (int64_t t = product * n / kShares; t < (product + 1) * n / kShares; ++t)
      dispatch_dtype<T>(p.dtype, [&]<class S>() {
        prefetch_block<S, kOut, false>(p, p.residual, grid.tile(first + t), c0, channels);
      });
  }

  // The groups together fetch the next weight while they use this one, if the weights do not fit in cache anyway.
  int prefetch_lines(int64_t groups) const {
    constexpr int64_t kCache = 512 << 10;
    if (packed_elements<Alg, E>(p.cin, p.cout) * int64_t{sizeof(T)} < kCache) return 0;
    return ceil_div(kPanel * L * sizeof(T) / 64, groups);
  }

  // ---- combine

  void combine_panel(const Scratch& s, int64_t first, int64_t n, int64_t c0, int64_t channels) const {
    ChannelMap<T> map[kPanelVectors];
    for (int v = 0; v * L < channels; ++v) map[v] = channel_map<T>(p, c0 + v * L, channels - v * L);
    int64_t run = 0, length = 0;
    for (int64_t t = 0; t < n; ++t) {
      const TileGrid::Tile at = grid.tile(first + t);
      if (t == run + length) run = t, length = min(n - t, grid.cols - at.col);
      if (!p.y_channels_last)
        dispatch_dtype<T>(p.dtype, [&]<class S>() {
          if (!is_streamed<S>(p, kOut)) prefetch_block<S, kOut, true>(p, p.y, at, c0, channels);
        });
      for (int v = 0; v * L < channels; ++v) {
        Vec<T> y[kOut * kOut];
        combine_tile(s.products + t * kPanel + v * L, s.product_stride, map[v], y);
        if (p.y_channels_last)
          dispatch_dtype<T>(p.dtype, [&]<class S>() { store_pixels<S, kOut>(p, at, c0 + v * L, channels - v * L, y); });
        else
          for (int i = 0; i < kOut; ++i)
            for (int j = 0; j < kOut; ++j)
              store(s.outputs + ((i * length + t - run) * kOut + j) * kPanel + v * L, y[i * kOut + j]);
      }
      if (!p.y_channels_last && t + 1 == run + length)
        dispatch_dtype<T>(p.dtype, [&]<class S>() {
          store_rows<S>(p, s.outputs, kOut, grid.tile(first + run), length, c0, channels);
        });
    }
  }

  static INLINE void combine_tile(const T* m, int64_t product_stride, const ChannelMap<T>& map, Vec<T>* y) {
    Vec<T> columns[kOut][kProducts];
    UNROLL(10) for (int q = 0; q < kProducts; ++q) {
      Vec<T> c[kProducts], sums[kOut];
      UNROLL(10) for (int i = 0; i < kProducts; ++i) c[i] = load(m + (i * kProducts + q) * product_stride);
      multiply_table<T, Alg::kA>(c, sums);
      UNROLL(4) for (int i = 0; i < kOut; ++i) columns[i][q] = sums[i];
    }
    UNROLL(4) for (int i = 0; i < kOut; ++i) multiply_table<T, Alg::kA>(columns[i], y + i * kOut);
    UNROLL(16) for (int i = 0; i < kOut * kOut; ++i) y[i] = y[i] * map.scale + map.shift;
  }
};

// The weight of a step: its one channel's, or its two channels' side by side.
template <class E, int N, class V>
INLINE V interleave(const V (&f)[E::kPair][N][N], int i, int j) {
  if constexpr (E::kPair == 2) return interleave_bf16(f[0][i][j], f[1][i][j]);
  return f[0][i][j];
}

// The weights of n output channels from co on for input channel ci, [tap][L].
template <class S, int kTaps, class T>
NOINLINE void gather_taps(const PackWeightParams& p, int64_t co, int64_t ci, int64_t n, T (*w)[kLanes<T>]) {
  const S* source = static_cast<const S*>(p.w) + co * p.w_stride[0] + ci * p.w_stride[1];
  for (int64_t k = 0; k < n; ++k, source += p.w_stride[0]) UNROLL(16)
  for (int tap = 0; tap < kTaps * kTaps; ++tap)
    w[tap][k] = to_compute(source[tap / kTaps * p.w_stride[2] + tap % kTaps * p.w_stride[3]]);
}

// G w G^T for every pair of channels: float sums, rounded once to what the products take.
template <class Alg, class E>
void pack_weight(const PackWeightParams& p) {
  using T = typename E::T;
  constexpr int L = kLanes<T>, kWeights = Alg::kWeights, kTaps = sizeof(Alg::kG[0]) / sizeof(double);
  const int64_t steps = ceil_div(p.cin, E::kPair), panels = ceil_div(p.cout, kPanelVectors * L);
  const bool large = panels * kPanelVectors * L * steps * kWeights * kWeights * int64_t{sizeof(T)} > 16 << 20;
  parallel_for(panels * steps, 64, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / steps, step = item % steps, c0 = panel * kPanelVectors * L;
      const int vectors = p.cout - c0 > L ? 2 : 1;
      T* u = static_cast<T*>(p.u) + panel * kPanelVectors * L * kWeights * kWeights * steps + step * vectors * L;
      for (int v = 0; v < vectors; ++v) {
        Vec<T> f[E::kPair][kWeights][kWeights];
        for (int e = 0; e < E::kPair; ++e) {
          const int64_t ci = step * E::kPair + e;
          T w[kTaps * kTaps][L] = {};
          const int64_t co = c0 + v * L, n = ci < p.cin ? min<int64_t>(L, p.cout - co) : 0;
          dispatch_dtype<T>(p.dtype, [&]<class S>() { gather_taps<S, kTaps, T>(p, co, ci, n, w); });
          Vec<T> columns[kWeights][kTaps];
          UNROLL(4) for (int j = 0; j < kTaps; ++j) {
            Vec<T> x[kTaps], sums[kWeights];
            UNROLL(4) for (int i = 0; i < kTaps; ++i) x[i] = load(w[i * kTaps + j]);
            multiply_table<T, Alg::kG>(x, sums);
            UNROLL(10) for (int i = 0; i < kWeights; ++i) columns[i][j] = sums[i];
          }
          UNROLL(10) for (int i = 0; i < kWeights; ++i) multiply_table<T, Alg::kG>(columns[i], f[e][i]);
        }
        for (int i = 0; i < kWeights; ++i)
          for (int j = 0; j < kWeights; ++j) {
            T* to = u + (i * kWeights + j) * steps * vectors * L + v * L;
            const Vec<T> w = interleave<E>(f, i, j);
            large ? stream(to, w) : store(to, w);
          }
      }
    }
    finish_streams();
  });
}

// The convolution by an algorithm, and the bytes of its packed weight, which it makes where there is memory for it.
template <class Alg>
void product_conv(const ProductConvParams& p) {
  dispatch_dot(p.dtype, [&]<class E>() {
    if constexpr (is_built<Alg, E>()) ProductConv<Alg, E>(p).run();
  });
}

template <class Alg>
int64_t product_conv_pack(const PackWeightParams& p) {
  int64_t bytes = 0;
  dispatch_dot(p.dtype, [&]<class E>() {
    if constexpr (is_built<Alg, E>()) {
      if (p.u) pack_weight<Alg, E>(p);
      bytes = packed_elements<Alg, E>(p.cin, p.cout) * int64_t{sizeof(typename E::T)};
    }
  });
  return bytes;
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
