// upsample_conv2d's forward on tensor cores (mma.sync, sm_80 and later).
//
// A block owns kHeight x 8 pixels at low resolution and 32 channels of y, and keeps the nine products' sums. Copies in
// flight bring a patch of x, one pixel more on every side, and the nine products' weights, packed in squares
// that matrices are loaded from. A left operand is two rows of eight pixels, so that the pixel above or below is in
// another register of the same lane, and the columns beside are other matrices of the patch: differences are formed in
// registers. All are differences to the centre. Sharing one between two products would save six of 24 subtractions, but
// mma wants its operands in four registers beside each other, and moving costs as much.
#include <type_traits>

#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

// Predicted for (1, 512, 128, 128) in bf16 with Wide, as the largest of its times at the tensor cores (163 us), shared
// memory (197) and L2 (151): 197 us on H200; on A100 300, of shared memory. Nine accumulators of 128 pixels x 32
// channels fill the registers, so no tile moves less.
template <class Factor_, int kWarpsOfPixels, int kFragments_, int kStages_>
struct Traits {
  using Factor = Factor_;
  using S = Element<Factor>;
  static constexpr int kFragments = kFragments_, kStages = kStages_, kWarpsOfChannels = 2;
  static constexpr int kWarpHeight = 2 * kFragments, kHeight = kWarpHeight * kWarpsOfPixels, kWidth = 8;
  static constexpr int kChannels = 16 * kWarpsOfChannels, kThreads = 32 * kWarpsOfPixels * kWarpsOfChannels;
  static constexpr int kChunk = 2 * kStep<S>;
  static constexpr int kPatchWidth = kWidth + 2, kPixels = (kHeight + 2) * kPatchWidth;
  using Patch = PatchCopies<S, kThreads, kPixels, kChunk / kPackSize<S>>;
  static constexpr int kWeights = 9 * kChunk * kChannels;
  static constexpr int kStage = Patch::kSize + kWeights;
  static constexpr int kLoadBytes = kStages * kStage * static_cast<int>(sizeof(S));
  static constexpr int kTileBytes = kTileBytesWithMoments<kThreads, 2 * kHeight, 2 * kWidth, kChannels>;
  static constexpr int kSharedBytes = kLoadBytes > kTileBytes ? kLoadBytes : kTileBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a block");
  static_assert(Patch::kSize * sizeof(S) % 16 == 0, "weights begin where 16-byte copies may");
};
// Eight warps on 16 x 8 pixels, one block on an SM. Three times the products of float fill the tensor cores with half
// the accumulators, whose operands, in two parts each, take the registers.
template <class F>
using Wide = std::conditional_t<std::is_same_v<F, float>, Traits<F, 4, 1, 3>, Traits<F, 4, 2, 3>>;
// 8 x 8 pixels, two blocks on an SM.
template <class F>
using Small = std::conditional_t<std::is_same_v<F, float>, Wide<F>, Traits<F, 2, 2, 2>>;

template <class T>
__global__ void __launch_bounds__(T::kThreads) forward_kernel(const __grid_constant__ UpsampleConv2dParams p) {
  using S = typename T::S;
  using Patch = typename T::Patch;
  S* const shared = dynamic_shared<S>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / T::kWarpsOfChannels * T::kWarpHeight, warp_channels = warp % T::kWarpsOfChannels;
  const ForwardTile<T> tile(p);
  const auto load = [&](int stage, int chunk) {
    S* const to = shared + stage * T::kStage;
    tile.patch.issue(to, tile.x, chunk * T::kChunk, p.x.channels);
    tile.weights.template issue<18>(to + Patch::kSize, chunk * 18);
  };

  using Operands = Operands<S, T::kFragments, Patch::kRow, T::kPatchWidth>;
  float sum[9][T::kFragments][2][4] = {};  // [product][two rows of pixels][8 channels]
  for_each_chunk<T::kStages>(tile.chunks, load, [&](int stage) {
    const S* const at = shared + stage * T::kStage;
    const Operands operands(at + warp_row * T::kPatchWidth * Patch::kRow);
    const S* const weights = at + Patch::kSize + (warp_channels * 32 + lane) * kPackSize<S>;
#pragma unroll
    for (int step = 0; step < T::kChunk / kStep<S>; ++step) {
      const auto products = [&](int column, const typename Operands::Column& v) {
        Operands::by_rows(v, [&](int row, const Fragment(&a)[T::kFragments]) {
          const int number = 3 * column + row;
          uint32_t w[4];
          load_matrices(w, weights + (step * 9 + number) * T::kChannels * kStep<S>);
          multiply(sum[number], a, w, typename T::Factor{});
        });
      };
      const auto centre = operands.column(1, step);
      products(0, centre);
      products(1, Operands::difference(operands.column(0, step), centre));
      products(2, Operands::difference(operands.column(2, step), centre));
    }
  });

  // Each pixel's 2 x 2 results: through shared memory, so that they leave for y in whole sectors.
  constexpr int kRow = T::kChannels + 4;
  float* const results = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const auto result = [&](int e) {
              const auto of = [&](int number) { return sum[number][m][n][half * 2 + e]; };
              return of(0) + of(1 + r) + of(3 + 3 * c) + of(4 + 3 * c + r);
            };
            const int i = 2 * (warp_row + m * 2 + half) + r, j = 2 * (lane / 4) + c;
            float* const to = results + (i * 2 * T::kWidth + j) * kRow + warp_channels * 16 + n * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(to) = {result(0), result(1)};
          }
  __syncthreads();
  const TileOfOutput at{tile.b, 2 * tile.i0, 2 * tile.j0, tile.n0, 2 * p.height, 2 * p.width};
  store_tile<T::kThreads, 2 * T::kHeight, 2 * T::kWidth, T::kChannels>(results, p, at, S{});
  if (p.moments) keep_moments<T::kThreads, 2 * T::kHeight, 2 * T::kWidth, T::kChannels>(results, p, at, S{});
}

}  // namespace

cudaError_t upsample_conv2d_kernel(const UpsampleConv2dParams& p, cudaStream_t stream) {
  return dispatch_factor(p.dtype, p.allow_tf32, [&]<class F>() {
    const auto run = [&]<class T>() {
      const cudaError_t error = launch(forward_kernel<T>, grid_of<T>(p), T::kThreads, T::kSharedBytes, stream, p);
      return then_moments<T>(error, p, stream);
    };
    return fills_gpu<Wide<F>>(p) ? run.template operator()<Wide<F>>() : run.template operator()<Small<F>>();
  });
}

}  // namespace imagegen::cuda
