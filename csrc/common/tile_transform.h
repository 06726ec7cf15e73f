// The first step of a convolution by products: sums of inputs, tile by tile.
//
// Tables has kIn, kStep, kOffset, kData and kB of common/product_conv.h. Channels are the lanes; input that is planar,
// or that is to be scaled, shifted and activated first, is staged a few channels at a time.
#pragma once
#include "memory.h"
#include "microkernel.h"

namespace imagegen {

// A tensor (B, C, H, W) of any strides, read as activation(x * scale + shift) where those are given; outside it is 0.
struct ImageView {
  const void* data;
  int64_t stride[4];
  int64_t channels, height, width;
  const void* scale = nullptr;  // (B, C), contiguous, in the compute type
  const void* shift = nullptr;
  Activation activation = Activation::linear;

  bool is_mapped() const { return scale || activation != Activation::linear; }
};

}  // namespace imagegen

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// f.template operator()<i>() for i in [0, N)
template <int N, class F>
INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, N>{});
}

// A table of constants, y = M x. Neighbouring rows that differ in some signs alone, as those of Winograd's points a and
// -a, are s + d and s - d; neighbouring columns of that kind are wanted as their sum and their difference alone. What
// they share is computed once: 13 operations instead of 22 for the input of F(4,3), 10 instead of 14 for its output.
template <int R, int C>
struct Table {
  double m[R][C];

  constexpr bool rows_mirror(int i) const {  // rows i and i + 1
    bool same = false, opposite = false;
    for (int c = 0; c < C; ++c) {
      if (i < 0 || i + 1 >= R || (m[i][c] != m[i + 1][c] && m[i][c] != -m[i + 1][c])) return false;
      (m[i][c] == m[i + 1][c] ? same : opposite) |= m[i][c] != 0;
    }
    return same && opposite && !rows_mirror(i - 1);
  }
  constexpr Table<C, R> transposed() const {
    Table<C, R> t{};
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) t.m[c][r] = m[r][c];
    return t;
  }
  constexpr bool any_rows_mirror() const {
    for (int i = 0; i < R; ++i)
      if (rows_mirror(i)) return true;
    return false;
  }
  // Each pair of mirrored columns as the coefficients of their sum and of their difference.
  constexpr Table fold_columns() const {
    Table f = *this;
    for (int j = 0; j < C; ++j)
      if (transposed().rows_mirror(j))
        for (int r = 0; r < R; ++r) {
          const bool same = m[r][j] == m[r][j + 1];
          f.m[r][j] = same ? m[r][j] : 0, f.m[r][j + 1] = same ? 0 : m[r][j];
        }
    return f;
  }
  // The entries of row i that its mirrored neighbour has too, or those it has with the other sign.
  constexpr Table part(int i, bool same) const {
    Table t{};
    for (int c = 0; c < C; ++c) t.m[i][c] = (m[i][c] == m[i + 1][c]) == same ? m[i][c] : 0;
    return t;
  }
  // Where the sum of row i begins: a coefficient of one if there is one, so that the rest are fused multiply-adds.
  constexpr int begin(int i) const {
    int first = -1;
    for (int c = C - 1; c >= 0; --c)
      if (m[i][c] == 1 || (m[i][c] != 0 && (first < 0 || m[i][first] != 1))) first = c;
    return first;
  }
};
template <int R, int C>
constexpr Table<R, C> make_table(const double (&m)[R][C]) {
  Table<R, C> t{};
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) t.m[r][c] = m[r][c];
  return t;
}

// What is computed of a table when compiling has to outlive it: tables are passed by reference.
template <const auto& kArray>
constexpr auto kTable = make_table(kArray);
template <const auto& kM>
constexpr auto kTransposed = kM.transposed();
template <const auto& kM>
constexpr auto kFolded = kM.fold_columns();
template <const auto& kM, int i, bool same>
constexpr auto kPart = kM.part(i, same);

// sum of kM.m[i][c] * x[c]; zeros and multiplications by one leave no code.
template <class T, const auto& kM, int i>
INLINE Vec<T> row_sum(const Vec<T>* x) {
  constexpr auto& row = kM.m[i];
  constexpr int first = kM.begin(i);
  if constexpr (first < 0) {
    return Vec<T>{};
  } else {
    Vec<T> s = row[first] == 1 ? x[first] : row[first] == -1 ? -x[first] : x[first] * T(row[first]);
    unrolled<sizeof(row) / sizeof(double)>([&]<int c>() __attribute__((always_inline)) {
      constexpr double k = kM.m[i][c];
      if constexpr (c == first || k == 0)
        return;
      else if constexpr (k == 1)
        s += x[c];
      else if constexpr (k == -1)
        s -= x[c];
      else
        s += x[c] * T(k);
    });
    return s;
  }
}

template <class T, const auto& kArray>
INLINE void multiply_table(const Vec<T>* x, Vec<T>* y) {
  constexpr auto& kM = kTable<kArray>;
  constexpr int R = sizeof(kArray) / sizeof(kArray[0]), C = sizeof(kArray[0]) / sizeof(double);
  if constexpr (kTransposed<kM>.any_rows_mirror()) {
    Vec<T> z[C];
    unrolled<C>([&]<int j>() __attribute__((always_inline)) {
      if constexpr (kTransposed<kTable<kArray>>.rows_mirror(j))
        z[j] = x[j] + x[j + 1];
      else if constexpr (kTransposed<kTable<kArray>>.rows_mirror(j - 1))
        z[j] = x[j - 1] - x[j];
      else
        z[j] = x[j];
    });
    unrolled<R>([&]<int i>() __attribute__((always_inline)) { y[i] = row_sum<T, kFolded<kTable<kArray>>, i>(z); });
  } else {
    unrolled<R>([&]<int i>() __attribute__((always_inline)) {
      constexpr auto& kM = kTable<kArray>;
      if constexpr (kM.rows_mirror(i)) {
        const Vec<T> s = row_sum<T, kPart<kM, i, true>, i>(x), d = row_sum<T, kPart<kM, i, false>, i>(x);
        y[i] = s + d, y[i + 1] = s - d;
      } else if constexpr (!kM.rows_mirror(i - 1)) {
        y[i] = row_sum<T, kM, i>(x);
      }
    });
  }
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
  T* const columns;  // [kIn rows][column][kChunk]: staged input
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
    if (x.stride[1] == 1 && !x.is_mapped()) return run_channels_last(first, n, to, chunk_stride, plane_stride);
    run_staged(first, n, to, chunk_stride, plane_stride);
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

  // A run of tiles in one row of tiles at a time, so that its staged pixels stay in cache. Rows that two runs share are
  // staged twice: half as much again of reading and activating, which is little beside the products.
  template <class To>
  void run_staged(int64_t first, int64_t n, const To& to, int64_t chunk_stride, int64_t plane_stride) const {
    for (int64_t run = 0; run < n;) {
      const TileGrid::Tile at = grid.tile(first + run);
      const int64_t length = min(n - run, grid.cols - at.col), width = (length - 1) * Tables::kStep + kIn;
      for (int64_t c = 0; c < x.channels; c += kChunk) {
        stage(at, c, width);
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
  void stage(const TileGrid::Tile& at, int64_t c0, int64_t width) const {
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
      for (int e = 0; e < E::kPair; ++e) {
        const int64_t c = c0 + e * L;
        dispatch_activation(x.activation, [&]<Activation A>() {
          stage_row<A>(at.b, c, row(at.b, h) + c * x.stride[1] + w0 * x.stride[3], begin, end, to + e * L);
        });
      }
    }
  }

  // L channels of the pixels begin .. end of a row, mapped, side by side every kChunk.
  template <Activation A>
  void stage_row(int64_t b, int64_t c, const S* from, int64_t begin, int64_t end, T* to) const {
    const int64_t channels = max<int64_t>(0, min<int64_t>(L, x.channels - c));
    Vec<T> scale = broadcast(T(1)), shift{};
    if (x.scale) {
      scale = load(static_cast<const T*>(x.scale) + b * x.channels + c, channels);
      shift = load(static_cast<const T*>(x.shift) + b * x.channels + c, channels);
    }
    const auto put = [&](int64_t w, Vec<T> v) __attribute__((always_inline)) {
      if (x.is_mapped()) v = activate<A, T>(v * scale + shift);
      store(to + w * kChunk, v);
    };
    if (x.stride[1] == 1) {
      for (int64_t w = begin; w < end; ++w) put(w, load(from + w * x.stride[3], channels));
      return;
    }
    for (int64_t w = begin; w < end; w += L) {
      const int64_t n = min<int64_t>(L, end - w);
      Vec<T> r[L];
      for (int k = 0; k < L; ++k)
        r[k] = k < channels ? load_row(from + k * x.stride[1] + w * x.stride[3], n) : Vec<T>{};
      transpose<T>(r);
      for (int k = 0; k < n; ++k) put(w + k, r[k]);
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
    Vec<T> sums[E::kPair][kData][kIn];
    UNROLL(2) for (int e = 0; e < E::kPair; ++e) {
      UNROLL(10) for (int j = 0; j < kIn; ++j) {
        Vec<T> v[kIn], column[kData];
        UNROLL(10) for (int i = 0; i < kIn; ++i) {
          const Source* pixel = pixels[i][j] + c + e * L;
          v[i] = kWhole ? load(pixel) : load(pixel, max<int64_t>(0, channels - e * L));
        }
        multiply_table<T, Tables::kB>(v, column);
        UNROLL(10) for (int i = 0; i < kData; ++i) sums[e][i][j] = column[i];
      }
    }
    UNROLL(10)
    for (int i = 0; i < kData; ++i) {
      Vec<T> f[E::kPair][kData];
      UNROLL(2) for (int e = 0; e < E::kPair; ++e) multiply_table<T, Tables::kB>(sums[e][i], f[e]);
      UNROLL(10) for (int j = 0; j < kData; ++j) store(d + (i * kData + j) * plane_stride, join<E>(f, j));
    }
  }

  // One vector of steps: bf16 channels 2k and 2k + 1 side by side.
  template <class D>
  static INLINE Vec<T> join(const Vec<T> (&f)[D::kPair][kData], int j) {
#if defined(__AVX512BF16__)
    if constexpr (D::kPair == 2) return (Vec<T>)_mm512_cvtne2ps_pbh((__m512)f[1][j], (__m512)f[0][j]);
#endif
    return f[0][j];
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
