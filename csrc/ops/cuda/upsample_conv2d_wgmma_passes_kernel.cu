// upsample_conv2d's forward by warpgroups (wgmma, sm_90a), for 128 channels of y at a time: one column type after
// another, three sums of 64 x 128 each. What both output columns share, of type S, waits in shared memory. Against the
// nine products at once, the patch is read three times, but the products are of full width and for each the weights'
// way through shared memory is half as long. Two blocks of neighbouring tiles bring the weights together.
#include "common/wgmma.cuh"
#include "upsample_conv2d_cluster.cuh"
#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

// Of the bytes that a block takes from L2, two thirds would be weights, 2,304 of 3,384 for each channel of x: all the
// other limits are below that one, which a cluster of two lowers by a third. Predicted, not measured, in bf16 on H200:
//                       L2 to a block            all of it: L2           tensor cores   shared memory
//   (1, 512, 128, 128)  1.73 MB, shared 1.14     136 us, shared  90       98 us         100 us
//   (1, 512, 256, 256)  1.73            1.14     546            360      391            401
//   (1, 256, 512, 512)  0.87            0.57     546            360      391            401
//   (8, 320, 32, 32)    1.08            0.71      32             21       23             24
// Clusters of four would take L2 to 67 us, where it no longer matters, and wait for the slowest of four.
template <class S_, bool kMoments>
struct Traits {
  using S = S_;
  static constexpr int kHeight = 16, kWidth = 8, kChannels = 128, kThreads = 256;
  static constexpr int kChunk = kStep<S>, kStages = 3;  // of the patch
  static constexpr int kPatchWidth = kWidth + 2, kPixels = (kHeight + 2) * kPatchWidth;
  using Patch = PatchCopies<S, kThreads, kPixels, kChunk / kPackSize<S>>;
  using Weights = ClusterWeights<S, kThreads, kChannels, 3>;
  static constexpr int kSums = kChannels / 2;                                // of a product, to a thread
  static constexpr int kKept = 2 * kSums * kThreads;                         // floats that wait: [row][sum][thread]
  static constexpr int kOfWarps = kMoments ? kThreads / 32 * kChannels : 0;  // moments of each warp's channels
  // Shared memory holds weights, patches, what waits and moments, in this order.
  static constexpr int kLoadBytes = Weights::kBytes + kStages * Patch::kSize * static_cast<int>(sizeof(S));
  static constexpr int kSharedBytes = kLoadBytes + 4 * kKept + 12 * kOfWarps;
  static_assert(sizeof(S) == 2 && kSharedBytes <= 227 * 1024, "what sm_90 gives a block");
  static_assert(Weights::kBytes % 16 == 0, "patches begin where 16-byte copies may");
};

#ifdef IMAGEGEN_HAS_WGMMA
// Of {first row, second row} x {two columns}, or of the first row alone, or of none.
__device__ __forceinline__ void moments_of_rows(const float (&v)[4], int rows, float& mean, float& m2) {
  const float first = (v[0] + v[1]) / 2, second = (v[2] + v[3]) / 2;
  mean = rows > 1 ? (first + second) / 2 : first;
  const auto square = [&](int i) { return (v[i] - mean) * (v[i] - mean); };
  m2 = (rows > 0 ? square(0) + square(1) : 0.f) + (rows > 1 ? square(2) + square(3) : 0.f);
}

// Of each of kChannels channels a lane has mean and m2 of n numbers; those of the eight lanes that differ in lane / 4
// are merged. Every round halves the channels that a lane goes on with, so that seven are sent where one after another
// 24 would be. A lane ends with an eighth of them: those from place lane / 4 * (kChannels / 8) on. For all channels of
// a block, 900 of the 36,000 cycles that it takes where x has 512 channels.
template <int kBit = 16, int kChannels>
__device__ __forceinline__ void merge_lanes(float& n, float (&mean)[kChannels], float (&m2)[kChannels]) {
  constexpr int kGone = kChannels * kBit / 32;
  const bool upper = threadIdx.x & kBit;
  const float others = __shfl_xor_sync(~0u, n, kBit), all = n + others, share = all > 0.f ? others / all : 0.f;
#pragma unroll
  for (int i = 0; i < kGone; ++i) {
    const float its_mean = __shfl_xor_sync(~0u, upper ? mean[i] : mean[i + kGone], kBit);
    const float its_m2 = __shfl_xor_sync(~0u, upper ? m2[i] : m2[i + kGone], kBit);
    const float my_mean = upper ? mean[i + kGone] : mean[i], d = its_mean - my_mean;
    mean[i] = my_mean + d * share;
    m2[i] = (upper ? m2[i + kGone] : m2[i]) + its_m2 + d * d * n * share;
  }
  n = all;
  if constexpr (kBit > 4) merge_lanes<kBit / 2>(n, mean, m2);
}
#endif

template <class T, Activation kActivation, bool kMoments>
__global__ void __launch_bounds__(T::kThreads) passes_kernel(const __grid_constant__ UpsampleConv2dParams p) {
#ifdef IMAGEGEN_HAS_WGMMA
  using S = typename T::S;
  using Patch = typename T::Patch;
  using Operands = Operands<S, 1, Patch::kRow, T::kPatchWidth>;
  char* const shared = dynamic_shared<char>();
  S* const patches = reinterpret_cast<S*>(shared + T::Weights::kBytes);
  float* const kept = reinterpret_cast<float*>(shared + T::kLoadBytes) + threadIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp owns rows 2 warp and 2 warp + 1
  // The block that fills up the last cluster has no tile: it multiplies the last one's again and keeps nothing of it.
  const int64_t tiles = tiles_of<T>(p), last = min(int64_t{blockIdx.x}, tiles - 1);
  const ForwardTile<T> tile(p, last);
  const typename T::Weights weights(reinterpret_cast<S*>(shared), p, tile.n0);
  cluster_arrive();
  int next_patch = 0;  // the same in every pass
  const auto load = [&](int stage, int) {
    tile.patch.issue(patches + stage * Patch::kSize, tile.x, next_patch * T::kChunk, p.x.channels);
    if (++next_patch == tile.chunks) next_patch = 0;
  };
  int next_weights = 0, type_of_next = 0;
  const auto load_weights = [&](int chunk) {
    weights.load(chunk, next_weights * 9 + type_of_next);
    if (++next_weights == tile.chunks) next_weights = 0, type_of_next += 3;
  };

  // This thread's results: of pixels (i, j) and (i + 1, j), channels c, c + 1 of every eight. What of them there is.
  const int64_t i = tile.i0 + 2 * warp, j = tile.j0 + lane / 4, c = tile.n0 + lane % 4 * 2;
  S* const y = static_cast<S*>(p.y) + ((tile.b * p.height + i) * 4 * p.width + 2 * j) * p.cout + c;
  const int rows = j < p.width && blockIdx.x < tiles ? static_cast<int>(p.height - i) : 0,
            channels = static_cast<int>(p.cout - c);

  // Of each warp's channels, those of one lane % 4 beside each other. Made where it is used: registers are short.
  const auto of_warps = [&] {
    return reinterpret_cast<Moments<float>*>(reinterpret_cast<float*>(shared + T::kLoadBytes) + T::kKept);
  };

  // A column type's share of the results: of type S it is kept with the bias, of the others it completes column
  // `type` - 1 of y.
  const auto finish = [&](int type, const float (&sum)[3][T::kSums]) {
    const S* const bias = p.bias ? static_cast<const S*>(p.bias) + (p.cout - channels) : nullptr;
    constexpr int kEights = 4;  // whose moments are merged at a time: more would not fit beside the sums
#pragma unroll
    for (int n0 = 0; n0 < T::kChannels / 8; n0 += kEights) {
      float mean[2 * kEights], m2[2 * kEights];
#pragma unroll
      for (int n = n0; n < n0 + kEights; ++n) {
        float results[2][4];  // what y then has
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            S* const to = y + ((2 * half + r) * 2 * p.width + type - 1) * p.cout;
            const int e = n * 4 + half * 2;
            float* const mine = kept + (r * T::kSums + e) * T::kThreads;
            const float first = sum[0][e] + sum[1 + r][e], second = sum[0][e + 1] + sum[1 + r][e + 1];
            if (type == 0) {
              const bool biased = bias && n * 8 < channels;
              mine[0] = first + (biased ? to_compute(bias[n * 8]) : 0.f);
              mine[T::kThreads] = second + (biased ? to_compute(bias[n * 8 + 1]) : 0.f);
            } else {
              const uint32_t pair = pack(activate<kActivation, float>(first + mine[0]),
                                         activate<kActivation, float>(second + mine[T::kThreads]), S{});
              if (half < rows && n * 8 < channels) *reinterpret_cast<uint32_t*>(to + n * 8) = pair;
              results[0][2 * half + r] = to_compute(S{static_cast<uint16_t>(pair)});
              results[1][2 * half + r] = to_compute(S{static_cast<uint16_t>(pair >> 16)});
            }
          }
        if constexpr (kMoments)
          for (int e = 0; e < 2; ++e) moments_of_rows(results[e], rows, mean[2 * (n - n0) + e], m2[2 * (n - n0) + e]);
      }
      if constexpr (kMoments) {
        if (type == 0) continue;
        float count = 2 * min(max(rows, 0), 2);
        merge_lanes(count, mean, m2);
        constexpr int kMine = kEights / 4;
        Moments<float>* const to =
            of_warps() + warp * T::kChannels + lane % 4 * (T::kChannels / 4) + 2 * n0 + lane / 4 * kMine;
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const Moments<float> m{count, mean[i], m2[i]};
          to[i] = type == 1 ? m : merge(to[i], m);
        }
      }
    }
  };

  const auto landed = [] {};
  Chunks<T::kStages, T::kStages - 1, decltype(landed), decltype(load)> chunks(3 * tile.chunks, landed, load);
  cluster_wait();
  for (int chunk = 0; chunk < min(T::Weights::kAhead, chunks.count); ++chunk) load_weights(chunk);
#pragma unroll 1
  for (int type = 0; type < 3; ++type) {
    float sum[3][T::kSums] = {};  // anew, so that finish() need not keep them
#pragma unroll 1
    for (int chunk = 0; chunk < tile.chunks; ++chunk) {
      const int at = chunks.at;
      const Operands operands(patches + chunks.next() * Patch::kSize + 2 * warp * T::kPatchWidth * Patch::kRow);
      auto column = operands.column(1, 0);
      if (type != 0) column = Operands::difference(operands.column(type == 1 ? 0 : 2, 0), column);
      Fragment a[3];
      Operands::by_rows(column, [&](int row, const Fragment(&operand)[1]) { a[row] = operand[0]; });
#pragma unroll
      for (int row = 0; row < 3; ++row) wgmma_hold(a[row].r);
      wgmma_wait<0>();  // the three before went on until here
#pragma unroll
      for (int row = 0; row < 3; ++row) wgmma_hold(a[row].r);
      if (at > 0) weights.release(at - 1);
      const SharedOperand w = shared_operand(weights.wait(at), Swizzle::none, 128, 256);
      wgmma_fence();
#pragma unroll
      for (int row = 0; row < 3; ++row)
        wgmma<Major::depth>(sum[row], a[row].r, w.plus(row * T::Weights::kProduct * 2), chunk > 0, S{});
      wgmma_commit();
      if (at + T::Weights::kAhead < chunks.count) load_weights(at + T::Weights::kAhead);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int row = 0; row < 3; ++row) wgmma_hold(sum[row]);
    if (type == 2) cluster_arrive();  // nothing more goes to the other block, nor comes from it
    finish(type, sum);
  }
  cluster_wait();
  if constexpr (kMoments) {
    __syncthreads();
    const int n = threadIdx.x % 32 / 2 * 8 + threadIdx.x / 32 * 2 + threadIdx.x % 2;  // the channel of this place
    if (threadIdx.x >= T::kChannels || tile.n0 + n >= p.cout || blockIdx.x >= tiles) return;
    Moments<float> m = of_warps()[threadIdx.x];
    for (int i = 1; i < T::kThreads / 32; ++i) m = merge(m, of_warps()[i * T::kChannels + threadIdx.x]);
    static_cast<Moments<float>*>(p.lots)[blockIdx.x * p.cout + tile.n0 + n] = m;
  }
#endif
}

template <class S, Activation kActivation, bool kMoments>
cudaError_t run(const UpsampleConv2dParams& p, cudaStream_t stream) {
  using T = Traits<S, kMoments>;
  if (p.weight_block != T::kChannels) return cudaErrorInvalidValue;
  const cudaError_t error = launch_clusters(kBlocksOfCluster, passes_kernel<T, kActivation, kMoments>,
                                            cluster_grid_of<T>(p), T::kThreads, T::kSharedBytes, stream, p);
  return then_moments<T>(error, p, stream);
}
template <class S>
cudaError_t run(const UpsampleConv2dParams& p, cudaStream_t stream) {
  if (p.activation == Activation::silu)
    return p.moments ? run<S, Activation::silu, true>(p, stream) : run<S, Activation::silu, false>(p, stream);
  return p.moments ? run<S, Activation::linear, true>(p, stream) : run<S, Activation::linear, false>(p, stream);
}

}  // namespace

cudaError_t upsample_conv2d_wgmma_passes_kernel(const UpsampleConv2dParams& p, cudaStream_t stream) {
  return p.dtype == Dtype::bf16 ? run<bf16>(p, stream) : run<fp16>(p, stream);
}

}  // namespace imagegen::cuda
