// The weight gradient of a convolution by products, in the transformed domain.
//
// Every product p of the algorithm sees input data X[p] and output gradient data D[p]; the gradient of its weight is
// their product summed over the tiles, and G^T brings it back to the kernel. X and D lie [tile][channel], as the
// transforms make them, and a microkernel multiplies them without packing.
#pragma once
#include <cstdint>

#include "scalar.h"

namespace imagegen {

struct ProductConvWeightParams {
  const void* x;
  const void* grad;
  int64_t x_stride[4], grad_stride[4];  // (B, C, H, W), any
  void* y;                              // (cout, cin, k, k), contiguous
  Dtype dtype;
  int64_t batch, cin, cout, in_h, in_w, out_h, out_w;
};

}  // namespace imagegen

#ifdef IMAGEGEN_CAPABILITY
#include "kept_memory.h"
#include "parallel.h"
#include "tile_transform.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Where one product's two sides begin.
template <class T>
struct Sides {
  const T* rows;
  const T* wide;
};

// m[R][V vectors] = before (if any) + sum over products and steps of rows[step][R] * wide[step][V vectors]
template <class T, int R, int V>
void accumulate(const Sides<T>* sides, int products, int64_t row_stride, int64_t wide_stride, int64_t steps,
                const T* before, T* m) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kAhead = 16;
  Vec<T> acc[R][V];
  UNROLL(12)
  for (int r = 0; r < R; ++r) UNROLL(2)
  for (int v = 0; v < V; ++v) acc[r][v] = before ? load(before + (r * kPanelVectors + v) * L) : Vec<T>{};
  for (int p = 0; p < products; ++p) {
    const T* t = sides[p].rows;
    const T* u = sides[p].wide;
    for (int64_t k = 0; k < steps; ++k, t += row_stride, u += wide_stride) {
      // Tiles lie kilobytes apart, which no prefetcher foresees.
      __builtin_prefetch(t + kAhead * row_stride);
      __builtin_prefetch(t + kAhead * row_stride + R - 1);
      UNROLL(2)
      for (int v = 0; v < V; ++v) __builtin_prefetch(u + kAhead * wide_stride + v * L);
      Vec<T> w[V];
      UNROLL(2)
      for (int v = 0; v < V; ++v) w[v] = load(u + v * L);
      UNROLL(12)
      for (int r = 0; r < R; ++r) UNROLL(2)
      for (int v = 0; v < V; ++v) acc[r][v] += w[v] * t[r];
    }
  }
  UNROLL(12)
  for (int r = 0; r < R; ++r) UNROLL(2)
  for (int v = 0; v < V; ++v) store(m + (r * kPanelVectors + v) * L, acc[r][v]);
}

template <class T>
using Accumulate = void (*)(const Sides<T>*, int, int64_t, int64_t, int64_t, const T*, T*);

template <class T, int V, int R = kRows>
INLINE Accumulate<T> accumulate_for_rows(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return accumulate_for_rows<T, V, R - 1>(rows);
  return &accumulate<T, R, V>;
}

// Alg has kInput and kGradient, the tables of the two transforms, kWeights, kG, and for each product the planes it
// reads and the weight it belongs to.
template <class Alg, class E>
class ProductConvWeight {
  using T = typename E::T;
  using Input = typename Alg::Input;
  using Gradient = typename Alg::Gradient;
  static constexpr int L = kLanes<T>, kPanel = kPanelVectors * L;
  static constexpr int kProducts = Alg::kProducts, kWeights = Alg::kWeights;
  static constexpr int kTaps = sizeof(Alg::kG[0]) / sizeof(double), kKernel = kTaps * kTaps;

  const ProductConvWeightParams& p;
  // The broadcast side and the side of vectors: the one with more channels fills vectors better.
  const bool swap;
  const int64_t n_rows, n_wide;
  const RowGroups groups;
  const TileGrid grid;
  const ImageView input, gradient;
  const int64_t tiles;

 public:
  explicit ProductConvWeight(const ProductConvWeightParams& p)
      : p(p),
        swap(p.cout < kPanel && p.cin > p.cout),
        n_rows(swap ? p.cout : p.cin),
        n_wide(swap ? p.cin : p.cout),
        groups(n_rows),
        grid{ceil_div(p.in_h, Input::kStep), ceil_div(p.in_w, Input::kStep)},
        input{p.x, p.dtype, {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_stride[3]}, p.cin, p.in_h, p.in_w},
        gradient{p.grad, p.dtype, {p.grad_stride[0], p.grad_stride[1], p.grad_stride[2], p.grad_stride[3]},
                 p.cout, p.out_h, p.out_w},
        tiles(p.batch * grid.rows * grid.cols) {}

  void run() const {
    const int64_t panels = ceil_div(n_wide, kPanel), n_groups = groups.count;
    const int64_t x_stride = padded(p.cin), d_stride = padded(p.cout);
    const int64_t per_tile = kInputs * x_stride + kGradients * d_stride, all_sums = panels * n_groups * kSums;
    const int64_t block = block_of_tiles(per_tile * sizeof(T), all_sums * sizeof(T));
    // A line more, lest a tile's planes meet in one cache set.
    const int64_t x_plane = block * x_stride + L, d_plane = block * d_stride + L;
    // Sums outlive a block only where there is another.
    const int64_t n_sums = tiles > block ? all_sums : 0;
    const KeptBlock memory = take_kept((kInputs * x_plane + kGradients * d_plane + n_sums) * sizeof(T));
    const Side x{static_cast<T*>(memory.p), x_stride, x_plane};
    const Side d{x.data + kInputs * x_plane, d_stride, d_plane};
    T* const sums = d.data + kGradients * d_plane;  // [panel][group of rows][weight][row][kPanel]
    // Groups that share a panel's tiles while those are in the first-level cache: as many as leave threads enough to
    // do.
    const int64_t together = max<int64_t>(1, min<int64_t>(4, panels * n_groups / (4 * num_threads())));
    const int64_t sets = ceil_div(n_groups, together);

    for (int64_t first = 0; first == 0 || first < tiles; first += block) {
      const int64_t n = min(block, tiles - first);
      const bool last = first + block >= tiles;
      transform(x, d, first, n);
      parallel_claim(panels * sets, [&](const auto& claim) {
        T* const scratch = static_cast<T*>(workspace((together * kSums + kPanel * kRows * kKernel + L) * sizeof(T)));
        for (int64_t item; (item = claim()) < panels * sets;) {
          const int64_t panel = item / sets, g0 = item % sets * together, g1 = min(n_groups, g0 + together);
          T* const kept = n_sums ? sums + (panel * n_groups + g0) * kSums : nullptr;
          T* const to = last ? scratch : kept;
          accumulate_groups(x, d, n, panel, g0, g1, first > 0 ? kept : nullptr, to);
          for (int64_t g = g0; last && g < g1; ++g)
            combine(to + (g - g0) * kSums, scratch + together * kSums, groups.first(g), groups.rows(g), panel * kPanel);
        }
      });
    }
    give_back(memory);
  }

 private:
  static constexpr int64_t kSums = kWeights * kWeights * kRows * kPanel;
  static constexpr int64_t kInputs = Input::kData * Input::kData, kGradients = Gradient::kData * Gradient::kData;

  // What became of a block of tiles of one tensor, [plane][tile][channel].
  struct Side {
    T* data;
    int64_t tile_stride, plane_stride;
  };

  // Every block but one writes and reads all sums, so its data may take as many bytes, within what the caches hold.
  int64_t block_of_tiles(int64_t per_tile, int64_t sums) const {
    const int64_t bytes = max<int64_t>(8 << 20, min<int64_t>(24 << 20, sums));
    const int64_t most = min<int64_t>(512, max<int64_t>(48, bytes / per_tile));
    return tiles > most ? ceil_div(tiles, ceil_div(tiles, most)) : max<int64_t>(1, tiles);
  }

  void transform(const Side& x, const Side& d, int64_t first, int64_t n) const {
    parallel_for(n, 8, [&](int64_t begin, int64_t end) {
      const int64_t m = end - begin;
      void* scratch = workspace(
          max(TileTransform<Input, E>::scratch_bytes(p.cin, m), TileTransform<Gradient, E>::scratch_bytes(p.cout, m)));
      const auto to = [&](const Side& side) {
        return [&side, begin](int64_t t) { return side.data + (begin + t) * side.tile_stride; };
      };
      TileTransform<Input, E>(input, grid, scratch, m).run(first + begin, m, to(x), L, x.plane_stride);
      TileTransform<Gradient, E>(gradient, grid, scratch, m).run(first + begin, m, to(d), L, d.plane_stride);
    });
  }

  // The sums of n tiles for one panel and groups g0 .. g1, [group][weight][row][kPanel], on top of those before.
  void accumulate_groups(const Side& x, const Side& d, int64_t n, int64_t panel, int64_t g0, int64_t g1,
                         const T* before, T* to) const {
    const Side &rows = swap ? d : x, &wide = swap ? x : d;
    for (int weight = 0; weight < kWeights * kWeights; ++weight)
      for (int64_t g = g0; g < g1; ++g) {
        Sides<T> sides[kProducts * kProducts];
        int products = 0;
        for (int i = 0; i < kProducts; ++i)
          for (int j = 0; j < kProducts; ++j)
            if (Alg::kWeightOf[i] == weight / kWeights && Alg::kWeightOf[j] == weight % kWeights)
              sides[products++] = {rows.data + plane(swap, i, j) * rows.plane_stride + groups.first(g),
                                   wide.data + plane(!swap, i, j) * wide.plane_stride + panel * kPanel};
        const auto kernel = n_wide - panel * kPanel > L ? accumulate_for_rows<T, 2>(groups.rows(g))
                                                        : accumulate_for_rows<T, 1>(groups.rows(g));
        const int64_t at = (g - g0) * kSums + weight * kRows * kPanel;
        kernel(sides, products, rows.tile_stride, wide.tile_stride, n, before ? before + at : nullptr, to + at);
      }
  }

  // A line more than a power of two, lest the same channel of all tiles meet in one cache set.
  static int64_t padded(int64_t channels) { return round_up(channels, kPanel) + L; }

  // The data plane that product (i, j) reads of the gradient or of the input.
  static int64_t plane(bool of_gradient, int i, int j) {
    return of_gradient ? Alg::kGradientOf[i] * Gradient::kData + Alg::kGradientOf[j]
                       : Alg::kInputOf[i] * Input::kData + Alg::kInputOf[j];
  }

  // G^T sums G for a group of rows and a panel of channels, put in order in `turned` and copied to (cout, cin, k, k).
  void combine(const T* sums, T* turned, int64_t row0, int64_t rows, int64_t wide0) const {
    const int64_t wides = min<int64_t>(kPanel, n_wide - wide0);
    const int64_t row_step = swap ? kKernel * wides : kKernel, wide_step = swap ? kKernel : kKernel * rows;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < wides; c += L) {
        const T* from = sums + row * kPanel + c;
        Vec<T> columns[kTaps][kWeights];
        UNROLL(6)
        for (int j = 0; j < kWeights; ++j) UNROLL(4)
        for (int a = 0; a < kTaps; ++a) {
          columns[a][j] = Vec<T>{};
          UNROLL(6)
          for (int i = 0; i < kWeights; ++i)
            if (Alg::kG[i][a] != 0)
              columns[a][j] += T(Alg::kG[i][a]) * load(from + (i * kWeights + j) * kRows * kPanel);
        }
        UNROLL(16)
        for (int tap = 0; tap < kKernel; ++tap) {
          Vec<T> v{};
          UNROLL(6)
          for (int j = 0; j < kWeights; ++j)
            if (Alg::kG[j][tap % kTaps] != 0) v += T(Alg::kG[j][tap % kTaps]) * columns[tap / kTaps][j];
          for (int64_t k = 0; k < min<int64_t>(L, wides - c); ++k)
            turned[row * row_step + (c + k) * wide_step + tap] = v[k];
        }
      }
    const int64_t runs = swap ? rows : wides, length = kKernel * (swap ? wides : rows);
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t co = swap ? row0 + i : wide0 + i, ci = swap ? wide0 : row0;
      dispatch_dtype<T>(p.dtype, [&]<class S>() {
        S* y = static_cast<S*>(p.y) + (co * p.cin + ci) * kKernel;
        for (int64_t k = 0; k < length; k += L) store(y + k, load(turned + i * length + k), length - k);
      });
    }
  }
};

// Sums over many tiles, of which the bf16 dot products would lose digits.
template <class Alg>
void product_conv_weight(const ProductConvWeightParams& p) {
  if constexpr (kVectorBytes == 16)
    if (p.dtype == Dtype::f64) return ProductConvWeight<Alg, DoubleDot>(p).run();
  ProductConvWeight<Alg, FloatDot>(p).run();
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
