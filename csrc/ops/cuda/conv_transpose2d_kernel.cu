// conv_transpose2d's forward on tensor cores (mma.sync, sm_80 and later), for stride 2 and padding 1.
//
// The outputs of one parity r of row and s of column, a phase, are an ordinary convolution of x: y[2i+r] is the sum
// over t of x[i+t+r-1] w[3-r-2t]. A block takes some pixels and channels of one phase and sums over (taps) x (channels
// of x), in steps of one tap and kDepth channels that pass through three stages of shared memory.
#include "common/copy_async.cuh"
#include "common/launch.cuh"
#include "common/mma_product.cuh"
#include "ops/cuda/conv_transpose2d_params.h"

namespace imagegen::cuda {
namespace {

// Predicted on an H200 for 512 to 512 channels and x of 128 x 128 in bf16: 340 us by mma.sync's half rate of tensor
// cores, 330 us by L2 at 6.5 TB/s (each product reads 2 (1/128 + 1/128) bytes), 280 us by shared memory at 128 bytes a
// clock (a warp's 32 x 64 outputs read 3 KB for 32768 products).
template <class Factor, int kBlockChannels>
struct Traits {
  using S = Element<Factor>;
  static constexpr bool kHalf = sizeof(S) == 2;
  static constexpr int kThreads = 256, kStages = 3;
  static constexpr int kPixels = kHalf ? 128 : 64, kChannels = kBlockChannels;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(S));
  static constexpr int kWarpPixels = kPixels / 4, kWarpChannels = kChannels / 2;
  static constexpr int kPack = 16 / static_cast<int>(sizeof(S));
  // Rows are 16 bytes longer than they hold, so that eight begin in different banks.
  static constexpr int kXRow = kDepth + kPack, kWeightRow = kChannels + kPack, kSumRow = kWarpChannels + 4;
  static constexpr int kXTile = kPixels * kXRow, kStage = kXTile + kDepth * kWeightRow;
  static constexpr int kStageBytes = kStages * kStage * static_cast<int>(sizeof(S));
  static constexpr int kSumBytes = kThreads / 32 * 16 * kSumRow * 4;
  static constexpr int kSharedBytes = kStageBytes + kPixels * 12;
  static_assert(kSumBytes <= kStageBytes, "sums leave through the stages' memory");
  static_assert(kXRow * sizeof(S) / 16 % 2 == 1 && kWeightRow * sizeof(S) / 16 % 2 == 1, "no bank conflicts");
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a block");
};

struct Pixel {
  int b, i, j;  // b is negative where there is none
};

// What a block of one phase sees of the kernel: 2 x 2 taps, or those of them that a 3x3 kernel has.
struct Taps {
  int r, s, first_h, first_w;
  __device__ Taps(int phase, int kernel) : r(phase / 2), s(phase % 2) {
    first_h = kernel == 3 ? 1 - r : 0, first_w = kernel == 3 ? 1 - s : 0;
  }
  __device__ int bits() const { return 2 - first_h - first_w; }  // their number is a power of two
  __device__ int h(int tap) const { return (tap >> (1 - first_w)) + first_h; }
  __device__ int w(int tap) const { return first_w ? 1 : tap & 1; }
};

__device__ __forceinline__ float channel(const void* p, Dtype dtype, int64_t n) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[n];
  if (dtype == Dtype::bf16) return to_compute(static_cast<const bf16*>(p)[n]);
  return to_compute(static_cast<const fp16*>(p)[n]);
}

// Bias, scale, shift and activation of kCount channels from n on.
template <int kCount>
__device__ __forceinline__ void finish(float (&v)[kCount], const ConvTranspose2dParams& p, int64_t n) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (n + i >= p.cout) break;
    if (p.bias) v[i] += channel(p.bias, p.dtype, n + i);
    if (p.scale) v[i] *= channel(p.scale, p.scale_dtype, n + i);
    if (p.shift) v[i] += channel(p.shift, p.shift_dtype, n + i);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = activate(p.activation, v[i]);
}

template <class Factor, int kBlockChannels>
__global__ void __launch_bounds__((Traits<Factor, kBlockChannels>::kThreads), 2)
    phase_kernel(const __grid_constant__ ConvTranspose2dParams p, bool x_packs, bool weight_packs, bool y_packs) {
  using T = Traits<Factor, kBlockChannels>;
  using S = typename T::S;
  using P = Product<Factor>;
  S* const stages = dynamic_shared<S>();
  Pixel* const pixels = reinterpret_cast<Pixel*>(reinterpret_cast<char*>(stages) + T::kStageBytes);

  // Blocks of the same pixels run side by side: x comes from memory once, and the weight stays in L2.
  const int64_t n_tiles = (p.cout + T::kChannels - 1) / T::kChannels;
  const int64_t n0 = blockIdx.x % n_tiles * T::kChannels;
  const Taps taps(static_cast<int>(blockIdx.x / n_tiles % 4), p.kernel);
  const int64_t rows = (p.out_h + 1) / 2, columns = (p.out_w + 1) / 2;
  for (int row = threadIdx.x; row < T::kPixels; row += T::kThreads) {
    const int64_t m = blockIdx.x / n_tiles / 4 * T::kPixels + row;
    const int64_t b = m / columns / rows;
    pixels[row] = {b < p.batch ? static_cast<int>(b) : -1, static_cast<int>(m / columns % rows),
                   static_cast<int>(m % columns)};
  }
  __syncthreads();

  const S* const x = static_cast<const S*>(p.x);
  const S* const weight = static_cast<const S*>(p.weight) + n0;
  const int cin = static_cast<int>(p.cin), steps = (cin + T::kDepth - 1) / T::kDepth << taps.bits();
  const auto fill_stage = [&](int step) {
    S* const x_tile = stages + step % T::kStages * T::kStage;
    S* const weight_tile = x_tile + T::kXTile;
    const int c0 = (step >> taps.bits()) * T::kDepth, tap = step & ((1 << taps.bits()) - 1);
    const int th = taps.h(tap), tw = taps.w(tap);
    const auto x_at = [&](int row, int c, bool& inside) {
      const Pixel pixel = pixels[row];
      const int64_t i = pixel.i + th + taps.r - 1, j = pixel.j + tw + taps.s - 1;
      inside = pixel.b >= 0 && i >= 0 && i < p.height && j >= 0 && j < p.width && c < cin;
      return inside ? x + pixel.b * p.x_stride[0] + c * p.x_stride[1] + i * p.x_stride[2] + j * p.x_stride[3] : x;
    };
    bool inside;
    if (x_packs)
      for (int e = threadIdx.x; e < T::kPixels * 4; e += T::kThreads) {
        const S* const from = x_at(e / 4, c0 + e % 4 * T::kPack, inside);
        copy_async(x_tile + e / 4 * T::kXRow + e % 4 * T::kPack, from, inside);
      }
    else
#pragma unroll 1
      for (int e = threadIdx.x; e < T::kPixels * T::kDepth; e += T::kThreads) {
        const int row = e % T::kPixels, d = e / T::kPixels;
        const S* const from = x_at(row, c0 + d, inside);
        x_tile[row * T::kXRow + d] = inside ? *from : S{};
      }

    // Of a weight [cin][kernel][kernel][cout].
    const int at = (3 - taps.r - 2 * th) * p.kernel + 3 - taps.s - 2 * tw, area = p.kernel * p.kernel;
    constexpr int kPacks = T::kChannels / T::kPack;
    if (weight_packs)
      for (int e = threadIdx.x; e < T::kDepth * kPacks; e += T::kThreads) {
        const int d = e / kPacks, n = e % kPacks * T::kPack;
        const bool there = c0 + d < cin && n0 + n < p.cout;
        const S* const from = weight + (int64_t{c0 + d} * area + at) * p.cout + n;
        copy_async(weight_tile + d * T::kWeightRow + n, there ? from : weight, there);
      }
    else
#pragma unroll 1
      for (int e = threadIdx.x; e < T::kDepth * T::kChannels; e += T::kThreads) {
        const int d = e / T::kChannels, n = e % T::kChannels;
        const bool there = c0 + d < cin && n0 + n < p.cout;
        weight_tile[d * T::kWeightRow + n] = there ? weight[(int64_t{c0 + d} * area + at) * p.cout + n] : S{};
      }
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = warp / 2 * T::kWarpPixels, column0 = warp % 2 * T::kWarpChannels;  // this warp's first
  float sum[T::kWarpPixels / 16][T::kWarpChannels / 8][4] = {};
#pragma unroll
  for (int stage = 0; stage < T::kStages - 1; ++stage) {
    if (stage < steps) fill_stage(stage);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<T::kStages - 2>();
    __syncthreads();  // this stage is there, and everyone is done with the one before
    if (step + T::kStages - 1 < steps) fill_stage(step + T::kStages - 1);
    copy_async_commit();
    const S* const x_tile = stages + step % T::kStages * T::kStage;
    const S* const weight_tile = x_tile + T::kXTile;
#pragma unroll 1  // two at a time would take more registers than two blocks leave
    for (int k = 0; k < T::kDepth; k += P::kDepth) {
      typename P::A a[T::kWarpPixels / 16];
#pragma unroll
      for (int i = 0; i < T::kWarpPixels / 16; ++i)
        a[i] = P::rows_for_straight(x_tile + (row0 + i * 16) * T::kXRow + k, T::kXRow);
#pragma unroll
      for (int j = 0; j < T::kWarpChannels / 16; ++j) {
        const typename P::B b = P::straight(weight_tile + k * T::kWeightRow + column0 + j * 16, T::kWeightRow);
#pragma unroll
        for (int i = 0; i < T::kWarpPixels / 16; ++i) P::add(sum[i] + 2 * j, a[i], b);
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // the stages are free: each warp's sums pass through a part of them, 16 pixels at a time

  float* const sums = reinterpret_cast<float*>(stages) + warp * 16 * T::kSumRow;
  S* const y = static_cast<S*>(p.y);
  const auto write = [&]<int kCount>(int row, int d, int row_of_block) {
    const Pixel pixel = pixels[row_of_block];
    const int64_t i = 2 * int64_t{pixel.i} + taps.r, j = 2 * int64_t{pixel.j} + taps.s, n = n0 + column0 + d;
    if (pixel.b < 0 || i >= p.out_h || j >= p.out_w || n >= p.cout) return;
    float v[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = sums[row * T::kSumRow + d + e];
    finish(v, p, n);
    S* const to = y + pixel.b * p.y_stride[0] + n * p.y_stride[1] + i * p.y_stride[2] + j * p.y_stride[3];
    if constexpr (kCount == 1) {
      *to = from_compute<S>(v[0]);
    } else {
      Pack<S> pack;
#pragma unroll
      for (int e = 0; e < kCount; ++e) pack.at[e] = from_compute<S>(v[e]);
      *reinterpret_cast<Pack<S>*>(to) = pack;
    }
  };
#pragma unroll
  for (int i = 0; i < T::kWarpPixels / 16; ++i) {
#pragma unroll
    for (int j = 0; j < T::kWarpChannels / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[(lane / 4 + e / 2 * 8) * T::kSumRow + j * 8 + lane % 4 * 2 + e % 2] = sum[i][j][e];
    __syncwarp();
    constexpr int kPacks = T::kWarpChannels / T::kPack;
    if (y_packs)
#pragma unroll 1
      for (int e = lane; e < 16 * kPacks; e += 32)
        write.template operator()<T::kPack>(e / kPacks, e % kPacks * T::kPack, row0 + i * 16 + e / kPacks);
    else
#pragma unroll 1
      for (int e = lane; e < 16 * T::kWarpChannels; e += 32)
        write.template operator()<1>(e % 16, e / 16, row0 + i * 16 + e % 16);
    __syncwarp();
  }
}

// Whether the channels of a pixel lie side by side, so that they can be read and written 16 bytes at a time.
template <class S>
bool in_packs(const void* p, int64_t channels, const int64_t (&stride)[4]) {
  const auto whole = [](int64_t elements) { return elements * sizeof(S) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride[1] == 1 && whole(channels) && whole(stride[0]) &&
         whole(stride[2]) && whole(stride[3]);
}

template <class Factor, int kBlockChannels>
cudaError_t run(const ConvTranspose2dParams& p, cudaStream_t stream) {
  using T = Traits<Factor, kBlockChannels>;
  using S = typename T::S;
  const int64_t pixels = p.batch * ((p.out_h + 1) / 2) * ((p.out_w + 1) / 2);
  const int64_t blocks = (pixels + T::kPixels - 1) / T::kPixels * 4 * ((p.cout + T::kChannels - 1) / T::kChannels);
  const bool weight_packs = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && p.cout * sizeof(S) % 16 == 0;
  return launch(phase_kernel<Factor, kBlockChannels>, dim3(static_cast<unsigned>(blocks)), T::kThreads, T::kSharedBytes,
                stream, p, in_packs<S>(p.x, p.cin, p.x_stride), weight_packs, in_packs<S>(p.y, p.cout, p.y_stride));
}

}  // namespace

cudaError_t conv_transpose2d_kernel(const ConvTranspose2dParams& p, cudaStream_t stream) {
  return dispatch_factor(p.dtype, p.allow_tf32, [&]<class F>() {
    constexpr int kMost = sizeof(Element<F>) == 2 ? 128 : 64;
    return p.cout <= 32 ? run<F, 32>(p, stream) : run<F, kMost>(p, stream);
  });
}

}  // namespace imagegen::cuda
