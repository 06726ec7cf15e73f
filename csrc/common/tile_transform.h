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
  Dtype dtype;
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

// The L channels from c on of a row's pixels begin .. end, side by side every `pixel` elements.
template <class S, class T>
NOINLINE void stage_row(const ImageView& x, const TileGrid::Tile& at, int64_t row, int64_t c, int64_t begin,
                        int64_t end, T* to, int64_t pixel) {
  constexpr int L = kLanes<T>;
  const int64_t channels = min<int64_t>(L, x.channels - c);
  const S* from = static_cast<const S*>(x.data) + at.b * x.stride[0] + row * x.stride[2] + c * x.stride[1];
  if (x.stride[1] == 1) {
    for (int64_t w = begin; w < end; ++w, to += pixel) store(to, load(from + w * x.stride[3], channels));
    return;
  }
  const int64_t next = c + L < x.channels ? L * x.stride[1] : 0;  // short rows far apart, which no prefetcher foresees
  for (int64_t w = begin; w < end; w += L) {
    // The last pixels come with some before them once more, so that they are a whole vector too.
    const int64_t first = max(begin, min(w, end - L)), n = min<int64_t>(L, end - first);
    const S* const lines = from + first * x.stride[3];
    T* const staged = to + (first - begin) * pixel;
    Vec<T> r[L], part[L] = {};  // what is less than L x L goes through memory, so that all else stays in registers
    if (n == L && channels == L && x.stride[3] == 1) {
      UNROLL(16)
      for (int k = 0; k < L; ++k) {
        __builtin_prefetch(lines + L + k * x.stride[1], 0, 3);
        __builtin_prefetch(lines + next + k * x.stride[1], 0, 2);
        r[k] = load(lines + k * x.stride[1]);
      }
    } else {
      for (int k = 0; k < channels; ++k) {
        const S* line = lines + k * x.stride[1];
        S pixels[L] = {};
        for (int64_t i = 0; x.stride[3] != 1 && i < n; ++i) pixels[i] = line[i * x.stride[3]];
        part[k] = x.stride[3] == 1 ? load(line, n) : load(pixels);
      }
      std::memcpy(r, part, sizeof(r));
    }
    transpose<T>(r);
    if (n == L) {
      UNROLL(16) for (int k = 0; k < L; ++k) store(staged + k * pixel, r[k]);
    } else {
      std::memcpy(part, r, sizeof(r));
      for (int k = 0; k < n; ++k) store(staged + k * pixel, part[k]);
    }
  }
}

// activation(v * scale + shift) of n staged pixels. By itself it costs a load and a store, which is little beside an
// activation, and is compiled once for all element types and tables.
template <class T>
NOINLINE void map_row(const ImageView& x, int64_t b, int64_t c, T* row, int64_t pixel, int64_t n) {
  const int64_t channels = min<int64_t>(kLanes<T>, x.channels - c);
  Vec<T> scale = broadcast(T(1)), shift{};
  if (x.scale) {
    scale = load(static_cast<const T*>(x.scale) + b * x.channels + c, channels);
    shift = load(static_cast<const T*>(x.shift) + b * x.channels + c, channels);
  }
  dispatch_activation(x.activation, [&]<Activation A>() {
    for (int64_t i = 0; i < n; ++i) store(row + i * pixel, activate<A, T>(load(row + i * pixel) * scale + shift));
  });
}

template <class Tables, class E>
class TileTransform {
  using T = typename E::T;
  static constexpr int L = kLanes<T>, kChunk = L * E::kPair, kIn = Tables::kIn, kData = Tables::kData;

  const ImageView& x;
  const TileGrid& grid;
  T* const columns;  // [kIn rows][column][kChunk]: staged input
  T* const zeros;    // a pixel outside the image

 public:
  static int64_t scratch_bytes(int64_t channels, int64_t tiles) {
    return (kIn * (tiles * Tables::kStep + kIn + L) * kChunk + round_up(channels, L)) * sizeof(T);
  }

  TileTransform(const ImageView& x, const TileGrid& grid, void* scratch, int64_t tiles)
      : x(x),
        grid(grid),
        columns(static_cast<T*>(scratch)),
        zeros(columns + kIn * (tiles * Tables::kStep + kIn + L) * kChunk) {
    std::memset(zeros, 0, x.channels * sizeof(T));
  }

  // Tiles first .. first + n: data plane i of tile t goes to to(t - first) + i * plane_stride, one vector of channels
  // every chunk_stride. Whole chunks of plain channels_last input are read where they lie, the rest is staged.
  template <class To>
  void run(int64_t first, int64_t n, const To& to, int64_t chunk_stride, int64_t plane_stride) const {
    const bool plain =
        x.stride[1] == 1 && !x.is_mapped() && E::kPair == 1 && x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    const int64_t in_place = plain ? x.channels / L * L : 0;
    if (in_place > 0) run_in_place(in_place, first, n, to, chunk_stride, plane_stride);
    if (in_place < x.channels) run_staged(in_place, first, n, to, chunk_stride, plane_stride);
  }

 private:
  // The channels before `end`.
  template <class To>
  void run_in_place(int64_t end, int64_t first, int64_t n, const To& to, int64_t chunk_stride,
                    int64_t plane_stride) const {
    for (int64_t t = 0; t < n; ++t) {
      const TileGrid::Tile at = grid.tile(first + t), next = grid.tile(first + t + 1);
      const T* image = static_cast<const T*>(x.data) + at.b * x.stride[0];
      const T* pixels[kIn][kIn];
      for (int i = 0; i < kIn; ++i)
        for (int j = 0; j < kIn; ++j) {
          const int64_t h = at.row * Tables::kStep + Tables::kOffset + i,
                        w = at.col * Tables::kStep + Tables::kOffset + j;
          const bool inside = h >= 0 && h < x.height && w >= 0 && w < x.width;
          pixels[i][j] = inside ? image + h * x.stride[2] + w * x.stride[3] : zeros;
        }
      T* d = to(t);
      for (int64_t c = 0; c < end; c += kChunk, d += chunk_stride) {
        prefetch_pixels(next, c);
        prefetch_planes(d + chunk_stride, plane_stride);
        transform(pixels, c, d, plane_stride);
      }
    }
  }

  // Brings a tile's pixels that its left neighbour has not read to the second-level cache. Where they come from memory
  // the transform takes half the time, as it does where the lines it will write are asked for before they are needed.
  // Inline, for compilers take a function that only prefetches for one that does nothing.
  INLINE void prefetch_pixels(const TileGrid::Tile& at, int64_t c) const {
    if constexpr (kVectorBytes < 64) return;  // not once for every part of a line
    const int64_t h0 = at.row * Tables::kStep + Tables::kOffset;
    const int64_t w0 = (at.col - 1) * Tables::kStep + Tables::kOffset + kIn;
    const T* row = static_cast<const T*>(x.data) + at.b * x.stride[0] + h0 * x.stride[2] + w0 * x.stride[3] + c;
    UNROLL(10) for (int i = 0; i < kIn; ++i, row += x.stride[2]) {
      if (h0 + i >= x.height) return;
      UNROLL(4) for (int j = 0; j < Tables::kStep; ++j) __builtin_prefetch(row + j * x.stride[3], 0, 2);
    }
  }
  static INLINE void prefetch_planes(const T* d, int64_t plane_stride) {
    if constexpr (kVectorBytes < 64) return;
    UNROLL(36) for (int i = 0; i < kData * kData; ++i) __builtin_prefetch(d + i * plane_stride, 1, 3);
  }

  // The channels from `begin` on, a run of tiles in one row of tiles at a time, so that its staged pixels stay in
  // cache. Rows that two runs share are staged twice: half as much again of reading and activating, which is little
  // beside the products.
  template <class To>
  void run_staged(int64_t begin, int64_t first, int64_t n, const To& to, int64_t chunk_stride,
                  int64_t plane_stride) const {
    for (int64_t run = 0; run < n;) {
      const TileGrid::Tile at = grid.tile(first + run);
      const int64_t length = min(n - run, grid.cols - at.col), width = (length - 1) * Tables::kStep + kIn;
      for (int64_t c = begin; c < x.channels; c += kChunk) {
        stage(at, c, width);
        for (int64_t t = 0; t < length; ++t) {
          const T* pixels[kIn][kIn];
          for (int i = 0; i < kIn; ++i)
            for (int j = 0; j < kIn; ++j) pixels[i][j] = columns + (i * width + t * Tables::kStep + j) * kChunk;
          transform(pixels, 0, to(run + t) + c / kChunk * chunk_stride, plane_stride);
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
        T* const pixels = to + begin * kChunk + e * L;
        if (c >= x.channels) {
          for (int64_t w = begin; w < end; ++w) store(to + w * kChunk + e * L, Vec<T>{});
          continue;
        }
        dispatch_dtype<T>(x.dtype,
                          [&]<class S>() { stage_row<S, T>(x, at, h, c, w0 + begin, w0 + end, pixels, kChunk); });
        if (x.is_mapped()) map_row(x, at.b, c, pixels, kChunk, end - begin);
      }
    }
  }

  // One chunk of channels of one tile. This is the longest code of a convolution: it is compiled once for each table,
  // and the call costs little beside it.
  static NOINLINE void transform(const T* const (&pixels)[kIn][kIn], int64_t c, T* d, int64_t plane_stride) {
    Vec<T> sums[E::kPair][kData][kIn];
    UNROLL(2) for (int e = 0; e < E::kPair; ++e) {
      UNROLL(10) for (int j = 0; j < kIn; ++j) {
        Vec<T> v[kIn], column[kData];
        UNROLL(10) for (int i = 0; i < kIn; ++i) v[i] = load(pixels[i][j] + c + e * L);
        multiply_table<T, Tables::kB>(v, column);
        UNROLL(10) for (int i = 0; i < kData; ++i) sums[e][i][j] = column[i];
      }
    }
    UNROLL(10)
    for (int i = 0; i < kData; ++i) {
      Vec<T> f[E::kPair][kData];
      UNROLL(2) for (int e = 0; e < E::kPair; ++e) multiply_table<T, Tables::kB>(sums[e][i], f[e]);
      UNROLL(10) for (int j = 0; j < kData; ++j) store(d + (i * kData + j) * plane_stride, join(f, j));
    }
  }

  // One vector of steps: bf16 channels 2k and 2k + 1 side by side.
  static INLINE Vec<T> join(const Vec<T> (&f)[E::kPair][kData], int j) {
#if defined(__AVX512BF16__)
    if constexpr (E::kPair == 2) return (Vec<T>)_mm512_cvtne2ps_pbh((__m512)f[1][j], (__m512)f[0][j]);
#endif
    return f[0][j];
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
