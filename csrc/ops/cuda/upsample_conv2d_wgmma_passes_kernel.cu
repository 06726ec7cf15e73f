// upsample_conv2d's forward by warpgroups (wgmma, sm_90a), for 128 channels of y at a time: one column type after
// another, three sums of 64 x 128 each. What both output columns share, of type S, waits in shared memory. Against the
// nine products at once, the patch is read three times, but the products are of full width and for each the weights'
// way through shared memory is half as long.
#include "common/wgmma.cuh"
#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

// Predicted for (1, 512, 128, 128) in bf16 on H200: tensor cores 98 us, shared memory 100, L2 136.
template <class S_, Activation kActivation_>
struct Traits {
  using S = S_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kHeight = 16, kWidth = 8, kChannels = 128, kThreads = 256;
  static constexpr int kChunk = kStep<S>, kStages = 4;
  static constexpr int kAhead = kStages - 2;  // one chunk is still multiplied while the next begins
  static constexpr int kPatchWidth = kWidth + 2, kPixels = (kHeight + 2) * kPatchWidth;
  using Patch = PatchCopies<S, kThreads, kPixels, kChunk / kPackSize<S>>;
  static constexpr int kProduct = kChannels * kChunk, kWeights = 3 * kProduct;
  static constexpr int kStage = Patch::kSize + kWeights;
  static constexpr int kSums = kChannels / 2;         // of a product, to a thread
  static constexpr int kKept = 2 * kSums * kThreads;  // floats that wait: [row][sum][thread]
  static constexpr int kSharedBytes = kStages * kStage * static_cast<int>(sizeof(S)) + 4 * kKept;
  static_assert(sizeof(S) == 2 && kSharedBytes <= 227 * 1024, "what sm_90 gives a block");
  static_assert(Patch::kSize * sizeof(S) % 16 == 0, "weights begin where operands may");
};

template <class T>
__global__ void __launch_bounds__(T::kThreads) passes_kernel(const __grid_constant__ UpsampleConv2dParams p) {
#ifdef IMAGEGEN_HAS_WGMMA
  using S = typename T::S;
  using Patch = typename T::Patch;
  using Operands = Operands<S, 1, Patch::kRow, T::kPatchWidth>;
  S* const shared = dynamic_shared<S>();
  float* const kept = reinterpret_cast<float*>(shared + T::kStages * T::kStage) + threadIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp owns rows 2 warp and 2 warp + 1
  const ForwardTile<T, 3> tile(p);
  int next = 0;  // the chunk of the patch to load: the same ones again in every pass
  const auto load = [&](int stage, int step) {
    tile.patch.issue(shared + stage * T::kStage, tile.x, next * T::kChunk, p.x.channels);
    copy_whole<T::kThreads, T::kWeights>(shared + stage * T::kStage + Patch::kSize,
                                         tile.weight + int64_t{step} * T::kWeights);
    next = next + 1 == tile.chunks ? 0 : next + 1;
  };

  // This thread's results: of pixels (i, j) and (i + 1, j), channels c, c + 1 of every eight. What of them there is.
  const int64_t i = tile.i0 + 2 * warp, j = tile.j0 + lane / 4, c = tile.n0 + lane % 4 * 2;
  S* const y = static_cast<S*>(p.y) + ((tile.b * p.height + i) * 4 * p.width + 2 * j) * p.cout + c;
  const int rows = j < p.width ? static_cast<int>(p.height - i) : 0, channels = static_cast<int>(p.cout - c);

  // A column type's share of the results: of type S it is kept with the bias, of the others it completes column
  // `type` - 1 of y.
  const auto finish = [&](int type, const float (&sum)[3][T::kSums]) {
    const S* const bias = p.bias ? static_cast<const S*>(p.bias) + (p.cout - channels) : nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        S* const to = y + ((2 * half + r) * 2 * p.width + type - 1) * p.cout;
#pragma unroll
        for (int n = 0; n < T::kChannels / 8; ++n) {
          const int e = n * 4 + half * 2;
          float* const mine = kept + (r * T::kSums + e) * T::kThreads;
          const float first = sum[0][e] + sum[1 + r][e], second = sum[0][e + 1] + sum[1 + r][e + 1];
          if (type == 0) {
            const bool biased = bias && n * 8 < channels;
            mine[0] = first + (biased ? to_compute(bias[n * 8]) : 0.f);
            mine[T::kThreads] = second + (biased ? to_compute(bias[n * 8 + 1]) : 0.f);
          } else if (half < rows && n * 8 < channels) {
            *reinterpret_cast<uint32_t*>(to + n * 8) =
                pack(activate<T::kActivation, float>(first + mine[0]),
                     activate<T::kActivation, float>(second + mine[T::kThreads]), S{});
          }
        }
      }
  };

  float sum[3][T::kSums] = {};
  const auto landed = [] { async_proxy_fence(); };
  Chunks<T::kStages, T::kAhead, decltype(landed), decltype(load)> chunks(3 * tile.chunks, landed, load);
#pragma unroll 1
  for (int type = 0; type < 3; ++type) {
#pragma unroll 1
    for (int chunk = 0; chunk < tile.chunks; ++chunk) {
      const S* const at = shared + chunks.next() * T::kStage;
      const Operands operands(at + 2 * warp * T::kPatchWidth * Patch::kRow);
      const SharedOperand weights = shared_operand(at + Patch::kSize, Swizzle::none, 128, 256);
      auto column = operands.column(1, 0);
      if (type != 0) column = Operands::difference(operands.column(type == 1 ? 0 : 2, 0), column);
      Fragment a[3];
      Operands::by_rows(column, [&](int row, const Fragment(&operand)[1]) { a[row] = operand[0]; });
#pragma unroll
      for (int row = 0; row < 3; ++row) wgmma_hold(a[row].r);
      wgmma_wait<0>();  // the three before went on until here
#pragma unroll
      for (int row = 0; row < 3; ++row) wgmma_hold(a[row].r);
      wgmma_fence();
#pragma unroll
      for (int row = 0; row < 3; ++row)
        wgmma<Major::depth>(sum[row], a[row].r, weights.plus(row * T::kProduct * 2), chunk > 0, S{});
      wgmma_commit();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int row = 0; row < 3; ++row) wgmma_hold(sum[row]);
    finish(type, sum);
  }
#endif
}

template <class S>
cudaError_t run(const UpsampleConv2dParams& p, cudaStream_t stream) {
  const auto run_with = [&]<class T>() {
    return launch(passes_kernel<T>, grid_of<T>(p), T::kThreads, T::kSharedBytes, stream, p);
  };
  return p.activation == Activation::silu ? run_with.template operator()<Traits<S, Activation::silu>>()
                                          : run_with.template operator()<Traits<S, Activation::linear>>();
}

}  // namespace

cudaError_t upsample_conv2d_wgmma_passes_kernel(const UpsampleConv2dParams& p, cudaStream_t stream) {
  return p.dtype == Dtype::bf16 ? run<bf16>(p, stream) : run<fp16>(p, stream);
}

}  // namespace imagegen::cuda
