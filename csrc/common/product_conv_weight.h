// The weight gradient of a convolution by products, in the transformed domain.
//
// Every product p of the algorithm sees input data X[p] and output gradient data D[p]; the gradient of its weight is
// their product summed over the tiles, and G^T brings it back to 3x3. X and D lie [tile][channel], as the transforms
// make them, and a microkernel multiplies them without packing.
#pragma once
#include <cstdint>

#include "scalar.h"

namespace imagegen {

struct ProductConvWeightParams {
  const void* x;
  const void* grad;
  int64_t x_stride[4], grad_stride[4];  // (B, C, H, W), any
  void* y;                              // (cout, cin, 3, 3), contiguous
  Dtype dtype;
  int64_t batch, cin, cout, in_h, in_w, out_h, out_w;
};

}  // namespace imagegen

#ifdef IMAGEGEN_CAPABILITY
#include "parallel.h"
#include "tile_transform.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// m[R][V vectors] += sum over steps of t[step][R] * u[step][V vectors]
template <class T, int R, int V>
void accumulate(const T* t, int64_t t_stride, const T* u, int64_t u_stride, int64_t steps, T* m) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V];
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  for (int64_t k = 0; k < steps; ++k, t += t_stride, u += u_stride) {
    Vec<T> w[V];
    UNROLL(2) for (int v = 0; v < V; ++v) w[v] = load(u + v * L);
    UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) acc[r][v] += w[v] * t[r];
  }
  UNROLL(12) for (int r = 0; r < R; ++r) UNROLL(2) for (int v = 0; v < V; ++v) {
    T* to = m + (r * kPanelVectors + v) * L;
    store(to, load(to) + acc[r][v]);
  }
}

template <class T>
using Accumulate = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*);

template <class T, int V, int R = kRows>
INLINE Accumulate<T> accumulate_for_rows(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return accumulate_for_rows<T, V, R - 1>(rows);
  return &accumulate<T, R, V>;
}

// Alg has kInput and kGradient, the tables of the two transforms, kWeights, kG, and for each product the planes it
// reads and the weight it belongs to.
template <class Alg, class S>
class ProductConvWeight {
  using E = std::conditional_t<sizeof(S) == 8, DoubleDot, FloatDot>;
  using T = typename E::T;
  using Input = typename Alg::Input;
  using Gradient = typename Alg::Gradient;
  static constexpr int L = kLanes<T>, kPanel = kPanelVectors * L;
  static constexpr int kProducts = Alg::kProducts, kWeights = Alg::kWeights;

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
        input{p.x, {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_stride[3]}, p.cin, p.in_h, p.in_w},
        gradient{
            p.grad, {p.grad_stride[0], p.grad_stride[1], p.grad_stride[2], p.grad_stride[3]}, p.cout, p.out_h, p.out_w},
        tiles(p.batch * grid.rows * grid.cols) {}

  void run() const {
    const int64_t panels = ceil_div(n_wide, kPanel);
    const RowGroups groups(n_rows);
    // Long sums over tiles pay for reading and writing their results; 4 MB of data stay in cache meanwhile.
    const int64_t x_stride = padded(p.cin), d_stride = padded(p.cout);
    const int64_t per_tile =
        (Input::kData * Input::kData * x_stride + Gradient::kData * Gradient::kData * d_stride) * sizeof(T);
    const int64_t block = min(tiles, min<int64_t>(512, max<int64_t>(48, (4 << 20) / per_tile)));
    const int64_t x_plane = block * x_stride, d_plane = block * d_stride;
    const int64_t n_x = Input::kData * Input::kData * x_plane, n_d = Gradient::kData * Gradient::kData * d_plane;
    const int64_t sum_stride = panels * n_rows * kPanel, n_sums = kWeights * kWeights * sum_stride;
    const size_t bytes = (n_x + n_d + n_sums) * sizeof(T);
    T* const memory = static_cast<T*>(allocate(bytes));
    T* const x = memory;
    T* const d = x + n_x;
    T* const sums = d + n_d;  // [weight][panel][row][kPanel]
    std::memset(sums, 0, n_sums * sizeof(T));

    for (int64_t first = 0; first < tiles; first += block) {
      const int64_t n = min(block, tiles - first);
      parallel_for(n, 8, [&](int64_t begin, int64_t end) {
        const int64_t m = end - begin;
        void* scratch = workspace(max(TileTransform<Input, E, S>::scratch_bytes(p.cin, m),
                                      TileTransform<Gradient, E, S>::scratch_bytes(p.cout, m)));
        TileTransform<Input, E, S>(input, grid, scratch, m)
            .run(first + begin, m, [&](int64_t t) { return x + (begin + t) * x_stride; }, L, x_plane);
        TileTransform<Gradient, E, S>(gradient, grid, scratch, m)
            .run(first + begin, m, [&](int64_t t) { return d + (begin + t) * d_stride; }, L, d_plane);
      });
      const T* rows = swap ? d : x;
      const T* wide = swap ? x : d;
      const int64_t row_stride = swap ? d_stride : x_stride, wide_stride = swap ? x_stride : d_stride;
      parallel_for(panels * groups.count, 1, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t panel = begin / groups.count, g0 = begin % groups.count;
          const int64_t g1 = min(groups.count, g0 + end - begin);
          for (int product = 0; product < kProducts * kProducts; ++product) {
            const int i = product / kProducts, j = product % kProducts;
            const T* px = rows + plane(swap, i, j) * block * row_stride;
            const T* pd = wide + plane(!swap, i, j) * block * wide_stride + panel * kPanel;
            T* to = sums + (Alg::kWeightOf[i] * kWeights + Alg::kWeightOf[j]) * sum_stride + panel * n_rows * kPanel;
            for (int64_t g = g0; g < g1; ++g) {
              const auto kernel = n_wide - panel * kPanel > L ? accumulate_for_rows<T, 2>(groups.rows(g))
                                                              : accumulate_for_rows<T, 1>(groups.rows(g));
              kernel(px + groups.first(g), row_stride, pd, wide_stride, n, to + groups.first(g) * kPanel);
            }
          }
          begin += g1 - g0;
        }
      });
    }
    parallel_for(panels * n_rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) combine(sums, sum_stride, item / n_rows, item % n_rows);
    });
    release(memory, bytes);
  }

 private:
  // A line more than a power of two, lest the same channel of all tiles meet in one cache set.
  static int64_t padded(int64_t channels) { return round_up(channels, kPanel) + L; }

  // The data plane that product (i, j) reads of the gradient or of the input.
  static int64_t plane(bool of_gradient, int i, int j) {
    return of_gradient ? Alg::kGradientOf[i] * Gradient::kData + Alg::kGradientOf[j]
                       : Alg::kInputOf[i] * Input::kData + Alg::kInputOf[j];
  }

  // G^T sums G for one row and a panel of channels, scattered to (cout, cin, 3, 3).
  void combine(const T* sums, int64_t sum_stride, int64_t panel, int64_t row) const {
    const T* from = sums + (panel * n_rows + row) * kPanel;
    for (int64_t c = 0; c < min<int64_t>(kPanel, n_wide - panel * kPanel); ++c) {
      const int64_t wide = panel * kPanel + c, co = swap ? row : wide, ci = swap ? wide : row;
      T columns[3][kWeights] = {};
      for (int j = 0; j < kWeights; ++j)
        for (int i = 0; i < kWeights; ++i)
          for (int a = 0; a < 3; ++a) columns[a][j] += T(Alg::kG[i][a]) * from[(i * kWeights + j) * sum_stride + c];
      S* y = static_cast<S*>(p.y) + (co * p.cin + ci) * 9;
      for (int a = 0; a < 3; ++a)
        for (int b = 0; b < 3; ++b) {
          T s = 0;
          for (int j = 0; j < kWeights; ++j) s += T(Alg::kG[j][b]) * columns[a][j];
          y[a * 3 + b] = from_compute<S>(s);
        }
    }
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
