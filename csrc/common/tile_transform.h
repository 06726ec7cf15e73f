// The first step of a convolution by products: sums of inputs, tile by tile.
//
// Tables has kIn, kStep, kOffset, kData and kB of common/product_conv.h. Channels are the lanes; planar input is turned
// a few channels at a time.
#pragma once
#include "memory.h"
#include "microkernel.h"

namespace imagegen {

// A tensor (B, C, H, W) of any strides.
struct ImageView {
  const void* data;
  int64_t stride[4];
  int64_t channels, height, width;
};

}  // namespace imagegen

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// sum of c[i] * x[i]; the coefficients are constants, so zeros and multiplications by one leave no code.
template <class T, int N>
INLINE Vec<T> weighted_sum(const double (&c)[N], const Vec<T>* x) {
  Vec<T> s{};
  bool empty = true;
  UNROLL(8) for (int i = 0; i < N; ++i) {
    if (c[i] == 0) continue;
    const Vec<T> term = c[i] == 1 || c[i] == -1 ? x[i] : x[i] * T(c[i] < 0 ? -c[i] : c[i]);
    s = empty ? (c[i] < 0 ? -term : term) : (c[i] < 0 ? s - term : s + term);
    empty = false;
  }
  return s;
}

// r[i] lane j <-> r[j] lane i, in log2(lanes) rounds of exchanged halves.
template <int H, class V, int... I>
INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  const V low = __builtin_shufflevector(a, b, (I & H ? L + I - H : I)...);
  b = __builtin_shufflevector(a, b, (I & H ? L + I : I + H)...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Index;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  const V low = __builtin_shuffle(a, b, Mask{(I & H ? L + I - H : I)...});
  b = __builtin_shuffle(a, b, Mask{(I & H ? L + I : I + H)...});
#endif
  a = low;
}
template <class T, int H = kLanes<T> / 2>
INLINE void transpose(Vec<T>* r) {
  constexpr int L = kLanes<T>;
  UNROLL(16)
  for (int i = 0; i < L; ++i)
    if ((i & H) == 0) exchange<H>(r[i], r[i + H], std::make_integer_sequence<int, L>{});
  if constexpr (H > 1) transpose<T, H / 2>(r);
}

// Which tile is where: tiles count along columns, then rows, then images.
struct TileGrid {
  int64_t rows, cols;
  struct Tile {
    int64_t b, row, col;
  };
  Tile tile(int64_t t) const { return {t / (rows * cols), t / cols % rows, t % cols}; }
};

template <class Tables, class E, class S>
class TileTransform {
  using T = typename E::T;
  static constexpr int L = kLanes<T>, kChunk = L * E::kPair, kIn = Tables::kIn, kData = Tables::kData;

  const ImageView& x;
  const TileGrid& grid;
  T* const columns;  // [kIn rows][column][kChunk]: turned planar input
  S* const zeros;    // a pixel outside the image

 public:
  static int64_t scratch_bytes(int64_t channels, int64_t tiles) {
    return kIn * (tiles * Tables::kStep + kIn + L) * kChunk * sizeof(T) + round_up((channels + kChunk) * sizeof(S), 64);
  }

  TileTransform(const ImageView& x, const TileGrid& grid, void* scratch, int64_t tiles)
      : x(x),
        grid(grid),
        columns(static_cast<T*>(scratch)),
        zeros(reinterpret_cast<S*>(columns + kIn * (tiles * Tables::kStep + kIn + L) * kChunk)) {
    std::memset(zeros, 0, (x.channels + kChunk) * sizeof(S));
  }

  // Tiles first .. first + n: data plane i of tile t goes to to(t - first) + i * plane_stride, one vector of channels
  // every chunk_stride.
  template <class To>
  void run(int64_t first, int64_t n, const To& to, int64_t chunk_stride, int64_t plane_stride) const {
    if (x.stride[1] == 1)
      run_channels_last(first, n, to, chunk_stride, plane_stride);
    else
      run_planar(first, n, to, chunk_stride, plane_stride);
  }

 private:
  template <class To>
  void run_channels_last(int64_t first, int64_t n, const To& to, int64_t chunk_stride, int64_t plane_stride) const {
    for (int64_t t = 0; t < n; ++t) {
      const TileGrid::Tile at = grid.tile(first + t);
      const S* pixels[kIn][kIn];
      for (int i = 0; i < kIn; ++i)
        for (int j = 0; j < kIn; ++j) {
          const int64_t h = at.row * Tables::kStep + Tables::kOffset + i,
                        w = at.col * Tables::kStep + Tables::kOffset + j;
          const bool inside = h >= 0 && h < x.height && w >= 0 && w < x.width;
          pixels[i][j] = inside ? row(at.b, h) + w * x.stride[3] : zeros;
        }
      T* d = to(t);
      for (int64_t c = 0; c < x.channels; c += kChunk, d += chunk_stride)
        transform(pixels, c, x.channels - c, d, plane_stride);
    }
  }

  // A run of tiles in one row of tiles at a time, so that its turned pixels stay in cache.
  template <class To>
  void run_planar(int64_t first, int64_t n, const To& to, int64_t chunk_stride, int64_t plane_stride) const {
    for (int64_t run = 0; run < n;) {
      const TileGrid::Tile at = grid.tile(first + run);
      const int64_t length = min(n - run, grid.cols - at.col), width = (length - 1) * Tables::kStep + kIn;
      for (int64_t c = 0; c < x.channels; c += kChunk) {
        turn(at, c, width);
        for (int64_t t = 0; t < length; ++t) {
          const T* pixels[kIn][kIn];
          for (int i = 0; i < kIn; ++i)
            for (int j = 0; j < kIn; ++j) pixels[i][j] = columns + (i * width + t * Tables::kStep + j) * kChunk;
          transform(pixels, 0, kChunk, to(run + t) + c / kChunk * chunk_stride, plane_stride);
        }
      }
      run += length;
    }
  }

  // columns[i][w] = kChunk channels of the pixel in row i, column w of the tiles' window; zeros outside.
  void turn(const TileGrid::Tile& at, int64_t c0, int64_t width) const {
    const int64_t w0 = at.col * Tables::kStep + Tables::kOffset;
    const int64_t begin = max<int64_t>(0, -w0), end = max(begin, min(width, x.width - w0));
    for (int i = 0; i < kIn; ++i) {
      T* to = columns + i * width * kChunk;
      const int64_t h = at.row * Tables::kStep + Tables::kOffset + i;
      if (h < 0 || h >= x.height) {
        std::memset(to, 0, width * kChunk * sizeof(T));
        continue;
      }
      std::memset(to, 0, begin * kChunk * sizeof(T));
      std::memset(to + end * kChunk, 0, (width - end) * kChunk * sizeof(T));
      const S* from = row(at.b, h) + w0 * x.stride[3];
      for (int64_t w = begin; w < end; w += L)
        for (int e = 0; e < E::kPair; ++e) {
          const int64_t c = c0 + e * L, n = min<int64_t>(L, end - w);
          Vec<T> r[L];
          for (int k = 0; k < L; ++k)
            r[k] = c + k < x.channels ? load_row(from + (c + k) * x.stride[1] + w * x.stride[3], n) : Vec<T>{};
          transpose<T>(r);
          for (int k = 0; k < n; ++k) store(to + (w + k) * kChunk + e * L, r[k]);
        }
    }
  }

  const S* row(int64_t b, int64_t h) const { return static_cast<const S*>(x.data) + b * x.stride[0] + h * x.stride[2]; }

  INLINE Vec<T> load_row(const S* p, int64_t n) const {
    if (x.stride[3] == 1) return load(p, n);
    S part[L] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i * x.stride[3]];
    return load(part);
  }

  template <class Source>
  static INLINE void transform(const Source* const (&pixels)[kIn][kIn], int64_t c, int64_t channels, T* d,
                               int64_t plane_stride) {
    channels >= kChunk ? transform<true>(pixels, c, channels, d, plane_stride)
                       : transform<false>(pixels, c, channels, d, plane_stride);
  }

  template <bool kWhole, class Source>
  static INLINE void transform(const Source* const (&pixels)[kIn][kIn], int64_t c, int64_t channels, T* d,
                               int64_t plane_stride) {
    Vec<T> f[E::kPair][kData][kData];
    UNROLL(2) for (int e = 0; e < E::kPair; ++e) {
      Vec<T> sums[kData][kIn];
      UNROLL(6) for (int j = 0; j < kIn; ++j) {
        Vec<T> v[kIn];
        UNROLL(6) for (int i = 0; i < kIn; ++i) {
          const Source* pixel = pixels[i][j] + c + e * L;
          v[i] = kWhole ? load(pixel) : load(pixel, max<int64_t>(0, channels - e * L));
        }
        UNROLL(6) for (int i = 0; i < kData; ++i) sums[i][j] = weighted_sum<T>(Tables::kB[i], v);
      }
      UNROLL(6)
      for (int i = 0; i < kData; ++i)
        UNROLL(6) for (int j = 0; j < kData; ++j) f[e][i][j] = weighted_sum<T>(Tables::kB[j], sums[i]);
    }
    UNROLL(6)
    for (int i = 0; i < kData; ++i)
      UNROLL(6) for (int j = 0; j < kData; ++j) store(d + (i * kData + j) * plane_stride, join<E>(f, i, j));
  }

  // One vector of steps: bf16 channels 2k and 2k + 1 side by side.
  template <class D>
  static INLINE Vec<T> join(const Vec<T> (&f)[D::kPair][kData][kData], int i, int j) {
#if defined(__AVX512BF16__)
    if constexpr (D::kPair == 2) return (Vec<T>)_mm512_cvtne2ps_pbh((__m512)f[1][i][j], (__m512)f[0][i][j]);
#endif
    return f[0][i][j];
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
