// The input of a convolution of few channels as few_inputs.h multiplies it.
#pragma once
#include "direct_conv.h"

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

constexpr int kProductsOfTile = 4;

// Elements of a and b, counted through both.
template <class V, size_t... I>
INLINE V pick(V a, V b, std::index_sequence<I...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}
// Every n-th of vectors 0 to i from element `first` on: b is vector i, and a vector 0, or what this made of those
// before.
template <int n, int first, int i, class V, size_t... I>
INLINE V every_nth(V a, V b, std::index_sequence<I...>) {
  constexpr int L = sizeof...(I);
  return pick(a, b,
              std::index_sequence<((n * I + first) / L == i ? L + (n * I + first) % L
                                   : i == 1                 ? (n * I + first) % L
                                                            : I)...>());
}
// a and b by turns, from element `first` of each on.
template <int first, class V, size_t... I>
INLINE V by_turns(V a, V b, std::index_sequence<I...>) {
  return pick(a, b, std::index_sequence<first + I / 2 + I % 2 * sizeof...(I)...>());
}

// A band of the input as it is multiplied, in the caches: [channel][product][row][tile], with a row of halo on each
// side. Tiles follow each other through the rows, so that no lane is idle however narrow the image.
template <class T>
class InputTiles {
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kColumns = 16 * L, kWidth = kColumns + 4 * L;

  const ProductConvParams& p;

 public:
  const int64_t columns, tiles;  // of output to a band, and tiles to a row
  const RowBands bands;
  const int64_t plane;  // what whole vectors reach

  explicit InputTiles(const ProductConvParams& p)
      : p(p),
        columns(min(p.out_w, kColumns)),
        tiles(ceil_div(columns, 2)),
        bands(p, p.out_h, most_rows(p.cin * kProductsOfTile * tiles), 1),
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
    if (channel == 1 && pixel == p.cin && p.cin == 2) return split<2>(x, n, to);
    if (channel == 1 && pixel == p.cin && p.cin == 3) return split<3>(x, n, to);
    if (channel == 1 && pixel == p.cin && p.cin == 4) return split<4>(x, n, to);
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

  // From channels side by side: a fifth of the time from three channels to 32.
  template <int kCin, class S>
  static void split(const S* x, int64_t n, T* to) {
    for (int64_t w = 0; w < n; w += L) {
      Vec<T> v[kCin];
      for (int i = 0; i < kCin; ++i) v[i] = load(x + w * kCin + i * L, max<int64_t>(0, (n - w) * kCin - i * L));
      unrolled<kCin>([&]<int c>() {
        Vec<T> r = v[0];
        unrolled<kCin - 1>([&]<int i>() { r = every_nth<kCin, c, i + 1>(r, v[i + 1], std::make_index_sequence<L>()); });
        store(to + c * kWidth + w, r, n - w);
      });
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
