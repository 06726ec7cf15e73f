// What upsample_conv2d's kernels share: patches of pixels on their way to shared memory, fragments, the way out.
//
// In one dimension, with S = w0 + w1 + w2,
//   y[2i]   = S x[i] + w0 (x[i-1] - x[i])
//   y[2i+1] = S x[i] + w2 (x[i+1] - x[i])
// and nested in two dimensions nine products of a type (S, 0, 2) for columns and one for rows: product 3 column + row.
#pragma once
#include "common/copy_async.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/moments.cuh"
#include "common/scalar.cuh"
#include "ops/cuda/upsample_conv2d_params.h"

namespace imagegen::cuda {
namespace {

// The depth of one product of fragments: 32 bytes of a pixel's channels.
template <class S>
constexpr int kStep = 2 * kPackSize<S>;

// 16 rows of a left operand, kStep<S> deep: {rows 0-7, rows 8-15} x {first, second 16 bytes}, rows first.
struct Fragment {
  uint32_t r[4];
};

// A difference costs as many issue slots as all else if taken in float; on pairs, whose one rounding is the same unless
// it is a difference of differences, a quarter.
template <class S>
__device__ __forceinline__ Fragment plus(const Fragment& a, const Fragment& b) {
  Fragment c;
#pragma unroll
  for (int i = 0; i < 4; ++i) c.r[i] = add(a.r[i], b.r[i], S{});
  return c;
}
template <class S>
__device__ __forceinline__ Fragment minus(const Fragment& a, const Fragment& b) {
  Fragment c;
#pragma unroll
  for (int i = 0; i < 4; ++i) c.r[i] = subtract(a.r[i], b.r[i], S{});
  return c;
}
// Eight rows of a, the first or second, above eight rows of b.
__device__ __forceinline__ Fragment rows(const Fragment& a, int half_a, const Fragment& b, int half_b) {
  return {{a.r[half_a], b.r[half_b], a.r[2 + half_a], b.r[2 + half_b]}};
}

// Left operands m, each times the 16 columns whose words a lane has in w: {columns 0-7, 8-15} x {first, second 16
// bytes}.
template <class S, int kFragments>
__device__ __forceinline__ void multiply(float (&c)[kFragments][2][4], const Fragment (&a)[kFragments],
                                         const uint32_t (&w)[4], S) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    mma(c[m][0], a[m].r, w[0], w[1], S{});
    mma(c[m][1], a[m].r, w[2], w[3], S{});
  }
}
// float as two tf32 numbers, which carry 22 of its 24 bits: three products instead of one, the smallest first.
struct Split {
  uint32_t high, low;
};
__device__ __forceinline__ Split split(uint32_t word) {
  const float x = __uint_as_float(word);
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - __uint_as_float(high))};
}
__device__ __forceinline__ uint32_t rounded(uint32_t word) {
  return to_tf32(__uint_as_float(word));
}
template <int kFragments>
__device__ __forceinline__ void multiply(float (&c)[kFragments][2][4], const Fragment (&a)[kFragments],
                                         const uint32_t (&w)[4], Tf32) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    const uint32_t r[4] = {rounded(a[m].r[0]), rounded(a[m].r[1]), rounded(a[m].r[2]), rounded(a[m].r[3])};
    mma(c[m][0], r, rounded(w[0]), rounded(w[1]), float{});
    mma(c[m][1], r, rounded(w[2]), rounded(w[3]), float{});
  }
}
template <int kFragments>
__device__ __forceinline__ void multiply(float (&c)[kFragments][2][4], const Fragment (&a)[kFragments],
                                         const uint32_t (&w)[4], float) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    Fragment high, low;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split s = split(a[m].r[i]);
      high.r[i] = s.high, low.r[i] = s.low;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {  // splits of w, made anew for every m, are not kept: registers are short
      const Split first = split(w[2 * n]), second = split(w[2 * n + 1]);
      mma(c[m][n], low.r, first.high, second.high, float{});
      mma(c[m][n], high.r, first.low, second.low, float{});
      mma(c[m][n], high.r, first.high, second.high, float{});
    }
  }
}

// The left operands of one step, of 2 kFragments rows of eight pixels of a patch whose pixels lie kRow elements and
// whose rows lie kPatchWidth pixels apart; p is the step's first channel of the pixel before and above the first.
template <class S, int kFragments, int kRow, int kPatchWidth>
struct Operands {
  struct Column {
    Fragment inner[kFragments], outer;  // rows {0, 1}, {2, 3} and so on; the row before them and the row behind
  };
  const S* at;  // of this lane: it names one row of a matrix
  int second;   // of two rows of pixels

  __device__ __forceinline__ explicit Operands(const S* p) {
    const int lane = threadIdx.x % 32;
    at = p + lane % 8 * kRow + lane / 16 * kPackSize<S>;
    second = lane / 8 % 2;
  }
  __device__ __forceinline__ Column column(int j, int step) const {
    const S* const from = at + j * kRow + step * kStep<S>;
    Column v;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) load_matrices(v.inner[m].r, from + (2 * m + 1 + second) * kPatchWidth * kRow);
    load_matrices(v.outer.r, from + (2 * kFragments + 1) * second * kPatchWidth * kRow);
    return v;
  }
  // use(row type, operand) for the three row types of a column type.
  template <class Use>
  static __device__ __forceinline__ void by_rows(const Column& v, const Use& use) {
    use(0, v.inner);
    Fragment beside[kFragments];
#pragma unroll
    for (int m = 0; m < kFragments; ++m)
      beside[m] = minus<S>(m ? rows(v.inner[m - 1], 1, v.inner[m], 0) : rows(v.outer, 0, v.inner[m], 0), v.inner[m]);
    use(1, beside);
#pragma unroll
    for (int m = 0; m < kFragments; ++m)
      beside[m] = minus<S>(
          m + 1 < kFragments ? rows(v.inner[m], 1, v.inner[m + 1], 0) : rows(v.inner[m], 1, v.outer, 1), v.inner[m]);
    use(2, beside);
  }
  // side minus centre
  static __device__ __forceinline__ Column difference(const Column& side, const Column& centre) {
    Column v;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) v.inner[m] = minus<S>(side.inner[m], centre.inner[m]);
    v.outer = minus<S>(side.outer, centre.outer);
    return v;
  }
};

// A patch of kPixels pixels on its way to shared memory, kPieces times 16 bytes of each. What a thread copies is the
// same for every chunk of channels but for where they begin.
template <class S, int kThreads, int kPixels, int kPieces>
struct PatchCopies {
  // 16 bytes more than they hold lie between pixels: eight rows of a matrix then begin in different banks.
  static constexpr int kRow = (kPieces + 1) * kPackSize<S>;
  static constexpr int kSize = kPixels * kRow;
  static constexpr int kCopies = (kPixels * kPieces + kThreads - 1) / kThreads;
  static constexpr int kOutside = -1, kNone = -2;
  static_assert(kPieces % 2 == 0 && kThreads % kPieces == 0, "odd strides; one piece of all its pixels to a thread");
  int from[kCopies];  // in units of 16 bytes from the image's beginning

  // place(pixel) is where pixel of the patch lies in the image, or kOutside.
  template <class Place>
  __device__ __forceinline__ explicit PatchCopies(const Place& place) {
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      const int pixel = (threadIdx.x + n * kThreads) / kPieces;
      from[n] = pixel < kPixels ? place(pixel) : kNone;
    }
  }

  __device__ __forceinline__ void issue(S* patch, const S* image, int first_channel, int channels) const {
    const int piece = threadIdx.x % kPieces * kPackSize<S>;
    const bool channel = first_channel + piece < channels;
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      if (from[n] == kNone) continue;
      const bool inside = channel && from[n] >= 0;
      const S* source = inside ? image + int64_t{from[n]} * kPackSize<S> + first_channel + piece : image;
      copy_async(patch + (threadIdx.x / kPieces + n * (kThreads / kPieces)) * kRow + piece, source, inside);
    }
  }
};

// The place of pixel (i, j) of an image of height x width, in units of 16 bytes; -1 outside.
template <class S>
__device__ __forceinline__ int pixel_place(const PixelImages& x, int64_t i, int64_t j, int64_t height, int64_t width) {
  if (i < 0 || i >= height || j < 0 || j >= width) return -1;
  return static_cast<int>((i * x.row_stride + j * x.pixel_stride) / kPackSize<S>);
}

// The packed weights of a block's kChannels channels, from n0 on, on their way to shared memory: of one product they
// lie beside each other, and `product` elements further those of the next. What a thread copies is the same for all.
template <class S, int kThreads, int kChannels>
struct WeightCopies {
  static constexpr int kProduct = kChannels * kStep<S>, kPieces = kProduct / kPackSize<S>;
  static constexpr int kAtOnce = kThreads / kPieces;  // products
  static_assert(kThreads % kPieces == 0, "whole products");
  const S* from;
  int product;

  __device__ __forceinline__ WeightCopies(const UpsampleConv2dParams& p, int64_t n0)
      : product(p.weight_block * kStep<S>) {
    const int64_t steps = weight_steps(int64_t{p.x.channels} * sizeof(S)), block = n0 / p.weight_block;
    from = static_cast<const S*>(p.weight) + (block * steps * 9 + threadIdx.x / kPieces) * product +
           n0 % p.weight_block * kStep<S> + threadIdx.x % kPieces * kPackSize<S>;
  }
  // kCount products from number `first` on, of which every step has nine. Unrolled, it keeps all places in registers.
  template <int kCount, int kUnroll = (kCount + kAtOnce - 1) / kAtOnce>
  __device__ __forceinline__ void issue(S* to, int first) const {
    const S* const begin = from + int64_t{first} * product;
    to += threadIdx.x * kPackSize<S>;
#pragma unroll kUnroll
    for (int n = 0; n < kCount; n += kAtOnce)
      if (n + kAtOnce <= kCount || threadIdx.x < (kCount - n) * kPieces)
        copy_async(to + n * kProduct, begin + n * product, true);
  }
};

// Chunks that pass through kStages of shared memory, kAhead of them on their way before they are asked for: load(stage,
// chunk) sends one on its way, landed() stands between a thread's copies and the others' use of them.
template <int kStages, int kAhead, class Landed, class Load>
struct Chunks {
  int count;
  const Landed& landed;
  const Load& load;
  int at = 0;

  __device__ __forceinline__ Chunks(int count, const Landed& landed, const Load& load)
      : count(count), landed(landed), load(load) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s < count) load(s, s);
      copy_async_commit();
    }
  }
  // The stage of the next chunk.
  __device__ __forceinline__ int next() {
    copy_async_wait<kAhead - 1>();
    landed();
    __syncthreads();  // this chunk is there for all, and all are done with the stage that is filled next
    const int ahead = at + kAhead;
    if (ahead < count) load(ahead % kStages, ahead);
    copy_async_commit();
    return at++ % kStages;
  }
};

// multiply(stage) for every chunk; then shared memory is free.
template <int kStages, int kAhead, class Landed, class Load, class Multiply>
__device__ __forceinline__ void for_each_chunk(int count, const Landed& landed, const Load& load,
                                               const Multiply& multiply) {
  Chunks<kStages, kAhead, Landed, Load> chunks(count, landed, load);
  while (chunks.at < count) multiply(chunks.next());
  copy_async_wait<0>();
  __syncthreads();
}
template <int kStages, class Load, class Multiply>
__device__ __forceinline__ void for_each_chunk(int count, const Load& load, const Multiply& multiply) {
  for_each_chunk<kStages, kStages - 1>(count, [] {}, load, multiply);
}

// The tiles of a kernel whose traits are T, in one image and in all.
template <class T>
__host__ __device__ int64_t tile_rows(const UpsampleConv2dParams& p) {
  return (p.height + T::kHeight - 1) / T::kHeight;
}
template <class T>
__host__ __device__ int64_t tile_columns(const UpsampleConv2dParams& p) {
  return (p.width + T::kWidth - 1) / T::kWidth;
}
template <class T>
__host__ __device__ int64_t tiles_of(const UpsampleConv2dParams& p) {
  return p.batch * tile_rows<T>(p) * tile_columns<T>(p);
}

// What a block of the forward reads: its pixels with one more on every side, and the weights of its channels.
template <class T>
struct ForwardTile {
  using S = typename T::S;
  int64_t b, i0, j0, n0;
  int chunks;
  const S* x;
  WeightCopies<S, T::kThreads, T::kChannels> weights;
  typename T::Patch patch;

  __device__ __forceinline__ explicit ForwardTile(const UpsampleConv2dParams& p, int64_t number = blockIdx.x)
      : ForwardTile(p, number, tile_columns<T>(p), tile_rows<T>(p)) {}

 private:
  __device__ __forceinline__ ForwardTile(const UpsampleConv2dParams& p, int64_t number, int64_t columns, int64_t rows)
      : b(number / (columns * rows)),
        i0(number / columns % rows * T::kHeight),
        j0(number % columns * T::kWidth),
        n0(int64_t{blockIdx.y} * T::kChannels),
        chunks((p.x.channels + T::kChunk - 1) / T::kChunk),
        x(static_cast<const S*>(p.x.p) + b * p.x.batch_stride),
        weights(p, n0),
        patch([&](int pixel) {
          const int64_t i = i0 + pixel / T::kPatchWidth - 1, j = j0 + pixel % T::kPatchWidth - 1;
          return pixel_place<S>(p.x, i, j, p.height, p.width);
        }) {}
};

// Where a block's tile of results lies in y, and what y is.
struct TileOfOutput {
  int64_t b, i0, j0, n0, height, width;
};

// Adds the bias to a tile [kRows x kColumns pixels][kChannels + 4] of results in shared memory, activates, rounds it
// and writes it to y: 16 bytes at a time along y's innermost axis, where those begin at multiples of 16.
template <int kThreads, int kRows, int kColumns, int kChannels, class S>
__device__ __forceinline__ void store_tile(float* tile, const UpsampleConv2dParams& p, const TileOfOutput& at, S) {
  constexpr int kRow = kChannels + 4, kPack = kPackSize<S>, kPixels = kRows * kColumns;
  static_assert(kThreads % (kChannels / 4) == 0 && kColumns % kPack == 0 && kChannels % kPack == 0, "whole packs");
  if (p.bias || p.activation != Activation::linear) {
    const int c = threadIdx.x % (kChannels / 4) * 4;
    float bias[4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      bias[e] = p.bias && at.n0 + c + e < p.cout ? to_compute(static_cast<const S*>(p.bias)[at.n0 + c + e]) : 0.f;
    for (int pixel = threadIdx.x / (kChannels / 4); pixel < kPixels; pixel += kThreads / (kChannels / 4)) {
      float4* const v = reinterpret_cast<float4*>(tile + pixel * kRow + c);
      *v = {activate(p.activation, v->x + bias[0]), activate(p.activation, v->y + bias[1]),
            activate(p.activation, v->z + bias[2]), activate(p.activation, v->w + bias[3])};
    }
    __syncthreads();
  }
  const bool last = p.y_channels_last;
  const bool whole = (last ? p.cout : at.width) % kPack == 0;
  const int64_t c_stride = last ? 1 : at.height * at.width, j_stride = last ? p.cout : 1;
  S* const y = static_cast<S*>(p.y) + at.b * p.cout * at.height * at.width;
  constexpr int kPacksOfRow = kColumns / kPack, kPacksOfPixel = kChannels / kPack;
  for (int v = threadIdx.x; v < kPixels * kPacksOfPixel; v += kThreads) {
    const int pixel = last ? v / kPacksOfPixel : v / kPacksOfRow / kChannels * kColumns + v % kPacksOfRow * kPack;
    const int c = last ? v % kPacksOfPixel * kPack : v / kPacksOfRow % kChannels;
    const int64_t i = at.i0 + pixel / kColumns, j = at.j0 + pixel % kColumns;
    if (i >= at.height || j >= at.width || at.n0 + c >= p.cout) continue;
    Pack<S> pack;
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      pack.at[e] = from_compute<S>(tile[(pixel + (last ? 0 : e)) * kRow + c + (last ? e : 0)]);
    S* const to = y + (at.n0 + c) * c_stride + (i * at.width + j) * j_stride;
    if (whole) {
      store(to, pack, kPack);
      continue;
    }
    const int64_t n = last ? p.cout - at.n0 - c : at.width - j;
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      if (e < n) to[e] = pack.at[e];
  }
}

// Moments of each channel of the tile that store_tile left, rounded as y is, to this block's lots of p. They pass
// through the shared memory behind the tile. Reading the tile takes 512 cycles of a block of 16 x 8 pixels x 32
// channels, which multiplies for 17,000 where x has 512 channels: 4 of 129 us.
template <int kThreads, int kRows, int kColumns, int kChannels>
constexpr int kTileBytesWithMoments =
    (kRows * kColumns * (kChannels + 4) + kThreads / 32 * kChannels * 3) * static_cast<int>(sizeof(float));
template <int kThreads, int kRows, int kColumns, int kChannels, class S>
__device__ __forceinline__ void keep_moments(float* tile, const UpsampleConv2dParams& p, const TileOfOutput& at, S) {
  constexpr int kRow = kChannels + 4, kTeams = kChannels / 4, kPixels = kRows * kColumns, kStep = kThreads / kTeams;
  constexpr int kWarps = kThreads / 32;
  static_assert(32 % kTeams == 0 && kPixels % (4 * kStep) == 0, "fours of pixels");
  const int c = threadIdx.x % kTeams * 4;
  Moments<float> of[4] = {};  // four channels of some pixels, four at a time: their mean, then the squares about it
  for (int first = threadIdx.x / kTeams; first < kPixels; first += 4 * kStep) {
    float v[4][4];
    bool inside[4];
    float n = 0;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int pixel = first + u * kStep;
      inside[u] = at.i0 + pixel / kColumns < at.height && at.j0 + pixel % kColumns < at.width;
      n += inside[u] ? 1.f : 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) v[u][e] = to_compute(from_compute<S>(tile[pixel * kRow + c + e]));
    }
    if (n == 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float mean = 0, m2 = 0;
#pragma unroll
      for (int u = 0; u < 4; ++u) mean += inside[u] ? v[u][e] : 0.f;
      mean /= n;
#pragma unroll
      for (int u = 0; u < 4; ++u) m2 += inside[u] ? (v[u][e] - mean) * (v[u][e] - mean) : 0.f;
      of[e] = merge(of[e], {n, mean, m2});
    }
  }
  Moments<float>* const of_warps = reinterpret_cast<Moments<float>*>(tile + kPixels * kRow);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
#pragma unroll
    for (int step = kTeams; step < 32; step *= 2) of[e] = merge(of[e], exchange(of[e], lane ^ step));
    if (lane < kTeams) of_warps[warp * kChannels + c + e] = of[e];
  }
  __syncthreads();
  if (threadIdx.x >= kChannels || at.n0 + threadIdx.x >= p.cout) return;
  Moments<float> m = of_warps[threadIdx.x];
  for (int i = 1; i < kWarps; ++i) m = merge(m, of_warps[i * kChannels + threadIdx.x]);
  static_cast<Moments<float>*>(p.lots)[blockIdx.x * p.cout + at.n0 + threadIdx.x] = m;
}

// The blocks of a kernel whose traits are T.
template <class T>
dim3 grid_of(const UpsampleConv2dParams& p) {
  return {static_cast<unsigned>(tiles_of<T>(p)), static_cast<unsigned>((p.cout + T::kChannels - 1) / T::kChannels)};
}

// What follows a forward kernel whose traits are T and which ended in `error`: the moments of y, where wanted.
template <class T>
cudaError_t then_moments(cudaError_t error, const UpsampleConv2dParams& p, cudaStream_t stream) {
  if (error != cudaSuccess || !p.moments) return error;
  return upsample_conv2d_moments_kernel(p, grid_of<T>(p).x / p.batch, stream);
}

// Whether T's blocks give every multiprocessor one and are not mostly taller than the image. Smaller tiles read more of
// their surroundings but leave less of the GPU idle; the bits of y are the same.
template <class T>
bool fills_gpu(const UpsampleConv2dParams& p) {
  const dim3 grid = grid_of<T>(p);
  return p.height > T::kHeight / 2 && int64_t{grid.x} * grid.y >= p.multiprocessors;
}

}  // namespace
}  // namespace imagegen::cuda
