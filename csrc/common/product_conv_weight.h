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

// m[R][V vectors] (+)= sum over products and steps of rows[step][R] * wide[step][V vectors]
template <class T, int R, int V>
void accumulate(const Sides<T>* sides, int products, int64_t row_stride, int64_t wide_stride, int64_t steps, T* m,
                bool continued) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V];
  UNROLL(12)
  for (int r = 0; r < R; ++r) UNROLL(2)
  for (int v = 0; v < V; ++v) acc[r][v] = continued ? load(m + (r * kPanelVectors + v) * L) : Vec<T>{};
  for (int p = 0; p < products; ++p) {
    const T* t = sides[p].rows;
    const T* u = sides[p].wide;
    for (int64_t k = 0; k < steps; ++k, t += row_stride, u += wide_stride) {
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
using Accumulate = void (*)(const Sides<T>*, int, int64_t, int64_t, int64_t, T*, bool);

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
  const TileGrid grid;
  const ImageView input, gradient;
  const int64_t tiles;

 public:
  explicit ProductConvWeight(const ProductConvWeightParams& p)
      : p(p),
        swap(p.cout < kPanel && p.cin > p.cout),
        n_rows(swap ? p.cout : p.cin),
        n_wide(swap ? p.cin : p.cout),
        grid{ceil_div(p.in_h, Input::kStep), ceil_div(p.in_w, Input::kStep)},
        input{p.x, p.dtype, {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_stride[3]}, p.cin, p.in_h, p.in_w},
        gradient{p.grad, p.dtype, {p.grad_stride[0], p.grad_stride[1], p.grad_stride[2], p.grad_stride[3]},
                 p.cout, p.out_h, p.out_w},
        tiles(p.batch * grid.rows * grid.cols) {}

  void run() const {
    const int64_t panels = ceil_div(n_wide, kPanel);
    const RowGroups groups(n_rows);
    // Long sums over tiles pay for reading and writing their results; 8 MB of data stay near meanwhile.
    const int64_t x_stride = padded(p.cin), d_stride = padded(p.cout);
    const int64_t per_tile =
        (Input::kData * Input::kData * x_stride + Gradient::kData * Gradient::kData * d_stride) * sizeof(T);
    const int64_t block = max<int64_t>(1, min(tiles, min<int64_t>(512, max<int64_t>(48, (8 << 20) / per_tile))));
    const int64_t x_plane = block * x_stride, d_plane = block * d_stride;
    const int64_t n_x = Input::kData * Input::kData * x_plane, n_d = Gradient::kData * Gradient::kData * d_plane;
    // Sums outlive a block only where there is another.
    const int64_t n_sums = tiles > block ? panels * groups.count * kSums : 0;
    const size_t bytes = (n_x + n_d + n_sums) * sizeof(T);
    const KeptBlock kept = take_kept(bytes);
    T* const x = static_cast<T*>(kept.p);
    T* const d = x + n_x;
    T* const sums = d + n_d;  // [panel][group of rows][weight][row][kPanel]

    for (int64_t first = 0; first == 0 || first < tiles; first += block) {
      const int64_t n = min(block, tiles - first);
      parallel_for(n, 8, [&](int64_t begin, int64_t end) {
        const int64_t m = end - begin;
        void* scratch = workspace(max(TileTransform<Input, E>::scratch_bytes(p.cin, m),
                                      TileTransform<Gradient, E>::scratch_bytes(p.cout, m)));
        TileTransform<Input, E>(input, grid, scratch, m)
            .run(first + begin, m, [&](int64_t t) { return x + (begin + t) * x_stride; }, L, x_plane);
        TileTransform<Gradient, E>(gradient, grid, scratch, m)
            .run(first + begin, m, [&](int64_t t) { return d + (begin + t) * d_stride; }, L, d_plane);
      });
      const T* rows = swap ? d : x;
      const T* wide = swap ? x : d;
      const int64_t row_stride = swap ? d_stride : x_stride, wide_stride = swap ? x_stride : d_stride;
      const bool last = first + block >= tiles;
      parallel_claim(panels * groups.count, [&](const auto& claim) {
        T* const scratch = static_cast<T*>(workspace((kSums + kPanel * kRows * kKernel + L) * sizeof(T)));
        for (int64_t item; (item = claim()) < panels * groups.count;) {
          const int64_t panel = item / groups.count, g = item % groups.count;
          T* const to = n_sums ? sums + item * kSums : scratch;
          const auto kernel = n_wide - panel * kPanel > L ? accumulate_for_rows<T, 2>(groups.rows(g))
                                                          : accumulate_for_rows<T, 1>(groups.rows(g));
          for (int weight = 0; weight < kWeights * kWeights; ++weight) {
            Sides<T> sides[kProducts * kProducts];
            int products = 0;
            for (int i = 0; i < kProducts; ++i)
              for (int j = 0; j < kProducts; ++j)
                if (Alg::kWeightOf[i] == weight / kWeights && Alg::kWeightOf[j] == weight % kWeights)
                  sides[products++] = {rows + plane(swap, i, j) * block * row_stride + groups.first(g),
                                       wide + plane(!swap, i, j) * block * wide_stride + panel * kPanel};
            kernel(sides, products, row_stride, wide_stride, n, to + weight * kRows * kPanel, first > 0);
          }
          if (last) combine(to, scratch + kSums, groups.first(g), groups.rows(g), panel * kPanel);
        }
      });
    }
    give_back(kept);
  }

 private:
  static constexpr int64_t kSums = kWeights * kWeights * kRows * kPanel;

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
