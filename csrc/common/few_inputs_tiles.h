// The input of a convolution of few channels as few_inputs.h multiplies it.
#pragma once
#include "direct_conv.h"

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

constexpr int kProductsOfTile = 4;

// A band of the input as it is multiplied, in the caches: [channel][product][row][tile], with a row of halo on each
// side. Tiles follow each other through the rows, so that no lane is idle however narrow the image.
template <class T>
class InputTiles {
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kColumns = 16 * L, kWidth = kColumns + 4 * L;
  // For a thread, which reads the weights from the core that ordered them: as long as it multiplies them by 40 pixels.
  static constexpr int64_t kLeastPixels = 64;

  const ProductConvParams& p;

 public:
  const int64_t columns, tiles;  // of output to a band, and tiles to a row
  const RowBands bands;
  const int64_t plane;  // what whole vectors reach

  explicit InputTiles(const ProductConvParams& p)
      : p(p),
        columns(min(p.out_w, kColumns)),
        tiles(ceil_div(columns, 2)),
        bands(p, p.out_h, most_rows(p.cin * kProductsOfTile * tiles), ceil_div(kLeastPixels, p.out_w)),
        plane(round_up((bands.rows + 2) * tiles, L) + 3 * L) {}

  int64_t elements() const { return p.cin * (kProductsOfTile * plane + kWidth); }

  void fill(T* to, int64_t b, int64_t h0, int64_t w0, int64_t height, int64_t width) const {
    T* const line = to + p.cin * kProductsOfTile * plane;  // [channel][kWidth], one pixel of halo on each side
    const int64_t first = max<int64_t>(0, w0 - 1), last = min(p.in_w, w0 + width + 1);
    std::memset(line, 0, p.cin * kWidth * sizeof(T));
    for (int64_t i = 0; i < height + 2; ++i, to += tiles) {
      const int64_t h = h0 + i - 1;
      if (h < 0 || h >= p.in_h) {
        for (int64_t k = 0; k < p.cin * kProductsOfTile; ++k) std::memset(to + k * plane, 0, tiles * sizeof(T));
        continue;
      }
      dispatch_dtype<T>(p.dtype, [&]<class S>() {
        read(static_cast<const S*>(p.x) + b * p.x_stride[0] + h * p.x_stride[2], first, last, line + first - w0 + 1);
      });
      map_channels(p, b, line + first - w0 + 1, kWidth, last - first);
      for (int64_t c = 0; c < p.cin; ++c) transform(line + c * kWidth, to + c * kProductsOfTile * plane);
    }
  }

 private:
  static int64_t most_rows(int64_t elements) {
    return max<int64_t>(1, (128 << 10) / (elements * int64_t{sizeof(T)} + 1) - 2);
  }

  // to[channel][k] = pixel first + k of a row.
  template <class S>
  void read(const S* row, int64_t first, int64_t last, T* to) const {
    const int64_t pixel = p.x_stride[3], channel = p.x_stride[1], n = last - first;
    const S* const x = row + first * pixel;
    if (split_channels(p, x, n, to, kWidth)) return;
    for (int64_t c = 0; c < p.cin; ++c, to += kWidth)
      for (int64_t w = 0; w < n; w += L) {
        const S* from = x + c * channel + w * pixel;
        S part[L];
        if (pixel != 1) {
          for (int64_t k = 0; k < min<int64_t>(L, n - w); ++k) part[k] = from[k * pixel];
          from = part;
        }
        store(to + w, load(from, n - w), n - w);
      }
  }

  // What is written behind a row is written again with the next.
  void transform(const T* x, T* to) const {
    for (int64_t t = 0; t < tiles; t += L, x += 2 * L) {
      const Vec<T> a = load(x), b = load(x + L), c = load(x + 2), d = load(x + L + 2);
      constexpr std::make_index_sequence<L> lanes;
      const Vec<T> x0 = every_nth<2, 0, 1>(a, b, lanes), x1 = every_nth<2, 1, 1>(a, b, lanes);
      const Vec<T> x2 = every_nth<2, 0, 1>(c, d, lanes), x3 = every_nth<2, 1, 1>(c, d, lanes);
      const Vec<T> data[kProductsOfTile] = {x0 - x2, x1 + x2, x2 - x1, x1 - x3};
      UNROLL(4) for (int i = 0; i < kProductsOfTile; ++i) store(to + i * plane + t, data[i]);
    }
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
