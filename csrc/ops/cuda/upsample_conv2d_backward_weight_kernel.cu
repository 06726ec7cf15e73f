// The gradient of upsample_conv2d's weight on tensor cores (mma.sync, sm_80 and later): for each of the nine products
// the correlation of its left operand with its share of gy, summed over pixels,
//   G[product][cout][cin] = sum over b, i, j of g[row type][column type] x'[row type][column type]
// where along an axis x' is (x[i], x[i-1] - x[i], x[i+1] - x[i]) and g is (gy[2i] + gy[2i+1], gy[2i], gy[2i+1]), and
// then the way back to the kernel: w0 = S + 0, w1 = S, w2 = S + 2, along rows and along columns.
//
// A block owns all nine products of some output and some input channels, over some of the tiles of 4 x 8 pixels. Both
// operands lie in shared memory with their channels side by side and are multiplied over pixels: they are read
// transposed. Partial sums of the blocks that share channels are added in the order of tiles: the same bits on every
// run and GPU.
#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

// Predicted for (1, 512, 128, 128) in bf16: tensor cores 163 us on H200, shared memory 160 (a warp reads 68 times 128
// bytes for 36 products), partial sums 18.
template <class Factor_>
struct Traits {
  using Factor = Factor_;
  using S = Element<Factor>;
  static constexpr int kFragments = sizeof(S) == 2 ? 2 : 1;  // of 16 output channels, to a warp
  static constexpr int kWarpsOfOut = 2, kWarpsOfIn = 4, kThreads = 32 * kWarpsOfOut * kWarpsOfIn;
  static constexpr int kOut = 16 * kFragments * kWarpsOfOut, kIn = 16 * kWarpsOfIn;
  static constexpr int kHeight = 4, kWidth = 8, kPatchWidth = kWidth + 2;
  static constexpr int kDepthRows = sizeof(S) == 2 ? 2 : 1;  // rows of eight pixels that one product sums over
  static constexpr int kPhase = kHeight * kWidth;
  using GradPatch = PatchCopies<S, kThreads, 4 * kPhase, kOut / kPackSize<S>>;
  using Patch = PatchCopies<S, kThreads, (kHeight + 2) * kPatchWidth, kIn / kPackSize<S>>;
  static constexpr int kStage = GradPatch::kSize + Patch::kSize, kStages = sizeof(S) == 2 ? 3 : 2;
  static constexpr int kSharedBytes = kStages * kStage * static_cast<int>(sizeof(S));
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a block");
};

template <class T>
int64_t tiles_of(const UpsampleConv2dWeightParams& p) {
  return p.batch * ((p.height + T::kHeight - 1) / T::kHeight) * ((p.width + T::kWidth - 1) / T::kWidth);
}
template <class T>
dim3 blocks_of(const UpsampleConv2dWeightParams& p) {
  return {static_cast<unsigned>((p.cout + T::kOut - 1) / T::kOut), static_cast<unsigned>((p.cin + T::kIn - 1) / T::kIn),
          static_cast<unsigned>(p.splits)};
}

// A product's operand of 16 channels: kDepthRows rows of eight pixels from p on, whose rows lie kLine elements apart.
// Words {channels 0-7, 8-15} x {first, second half of the depth}, channels first: so a left operand has them.
template <int kRow, int kLine, class S>
__device__ __forceinline__ Fragment load_transposed(const S* p, S) {
  const int lane = threadIdx.x % 32;
  Fragment v;
  load_matrices_transposed(v.r, p + lane % 8 * kRow + lane / 16 * kLine + lane / 8 % 2 * 8);
  return v;
}
template <int kRow, int kLine>
__device__ __forceinline__ Fragment load_transposed(const float* p, float) {
  const int lane = threadIdx.x % 32;
  const uint32_t* const at = reinterpret_cast<const uint32_t*>(p + lane % 4 * kRow + lane / 4);
  return {{at[0], at[8], at[4 * kRow], at[4 * kRow + 8]}};
}

template <class T>
__global__ void __launch_bounds__(T::kThreads)
    backward_weight_kernel(const __grid_constant__ UpsampleConv2dWeightParams p, int64_t tiles) {
  using S = typename T::S;
  using Patch = typename T::Patch;
  using GradPatch = typename T::GradPatch;
  constexpr int kFragments = T::kFragments;
  S* const shared = dynamic_shared<S>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int out0 = blockIdx.x * T::kOut, in0 = blockIdx.y * T::kIn;
  const int warp_out = warp / T::kWarpsOfIn * 16 * kFragments, warp_in = warp % T::kWarpsOfIn * 16;
  const int64_t tiles_w = (p.width + T::kWidth - 1) / T::kWidth, tiles_h = (p.height + T::kHeight - 1) / T::kHeight;
  const int64_t first = tiles * blockIdx.z / p.splits, last = tiles * (blockIdx.z + 1) / p.splits;

  const auto load = [&](int stage, int n) {
    const int64_t tile = first + n, b = tile / (tiles_w * tiles_h);
    const int64_t i0 = tile / tiles_w % tiles_h * T::kHeight, j0 = tile % tiles_w * T::kWidth;
    S* const to = shared + stage * T::kStage;
    const GradPatch grad([&](int pixel) {
      const int phase = pixel / T::kPhase, in_phase = pixel % T::kPhase;
      const int64_t i = 2 * (i0 + in_phase / T::kWidth) + phase / 2, j = 2 * (j0 + in_phase % T::kWidth) + phase % 2;
      return pixel_place<S>(p.grad, i, j, 2 * p.height, 2 * p.width);
    });
    grad.issue(to, static_cast<const S*>(p.grad.p) + b * p.grad.batch_stride, out0, p.grad.channels);
    const Patch patch([&](int pixel) {
      const int64_t i = i0 + pixel / T::kPatchWidth - 1, j = j0 + pixel % T::kPatchWidth - 1;
      return pixel_place<S>(p.x, i, j, p.height, p.width);
    });
    patch.issue(to + GradPatch::kSize, static_cast<const S*>(p.x.p) + b * p.x.batch_stride, in0, p.x.channels);
  };

  float sum[9][kFragments][2][4] = {};  // [product][16 output channels][8 input channels]
  for_each_chunk<T::kStages>(static_cast<int>(last - first), load, [&](int stage) {
    constexpr int kGradLine = T::kWidth * GradPatch::kRow, kLine = T::kPatchWidth * Patch::kRow;
    const S* const grad_tile = shared + stage * T::kStage + warp_out;
    const S* const tile = shared + stage * T::kStage + GradPatch::kSize + warp_in;
#pragma unroll
    for (int i = 0; i < T::kHeight; i += T::kDepthRows) {
      Fragment grad[2][2][kFragments];  // [row][column] of a pixel's four
#pragma unroll
      for (int phase = 0; phase < 4; ++phase)
#pragma unroll
        for (int m = 0; m < kFragments; ++m)
          grad[phase / 2][phase % 2][m] = load_transposed<GradPatch::kRow, kGradLine>(
              grad_tile + phase * T::kPhase * GradPatch::kRow + i * kGradLine + m * 16, S{});
      struct Column {
        Fragment centre, above, below;
      };
      const auto column_of = [&](int j) {
        const S* const at = tile + (i + 1) * kLine + j * Patch::kRow;
        return Column{load_transposed<Patch::kRow, kLine>(at, S{}),
                      load_transposed<Patch::kRow, kLine>(at - kLine, S{}),
                      load_transposed<Patch::kRow, kLine>(at + kLine, S{})};
      };
      const auto product = [&](int number, const Fragment(&a)[kFragments], const Fragment& b) {
        const uint32_t w[4] = {b.r[0], b.r[2], b.r[1], b.r[3]};
        multiply(sum[number], a, w, typename T::Factor{});
      };
      const auto products = [&](int column, const Fragment(&even)[kFragments], const Fragment(&odd)[kFragments],
                                const Column& v) {
        Fragment both[kFragments];
#pragma unroll
        for (int m = 0; m < kFragments; ++m) both[m] = plus<S>(even[m], odd[m]);
        product(3 * column, both, v.centre);
        product(3 * column + 1, even, minus<S>(v.above, v.centre));
        product(3 * column + 2, odd, minus<S>(v.below, v.centre));
      };
      const Column centre = column_of(1);
      Fragment even[kFragments], odd[kFragments];
#pragma unroll
      for (int m = 0; m < kFragments; ++m)
        even[m] = plus<S>(grad[0][0][m], grad[0][1][m]), odd[m] = plus<S>(grad[1][0][m], grad[1][1][m]);
      products(0, even, odd, centre);
#pragma unroll
      for (int type = 1; type <= 2; ++type) {
        const Column side = column_of(type == 1 ? 0 : 2);
        products(type, grad[0][type - 1], grad[1][type - 1],
                 {minus<S>(side.centre, centre.centre), minus<S>(side.above, centre.above),
                  minus<S>(side.below, centre.below)});
      }
    }
  });

  float* const partial = p.partial + int64_t{blockIdx.z} * 9 * p.cout * p.cin;
#pragma unroll
  for (int number = 0; number < 9; ++number)
#pragma unroll
    for (int m = 0; m < kFragments; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t out = out0 + warp_out + m * 16 + lane / 4 + e / 2 * 8;
          const int64_t in = in0 + warp_in + n * 8 + lane % 4 * 2 + e % 2;
          if (out < p.cout && in < p.cin) partial[(number * p.cout + out) * p.cin + in] = sum[number][m][n][e];
        }
}

// A thread adds up one pair of channels and takes its nine sums back to the kernel.
template <class S>
__global__ void __launch_bounds__(256) reduce_kernel(const __grid_constant__ UpsampleConv2dWeightParams p) {
  const int64_t pairs = p.cout * p.cin, pair = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (pair >= pairs) return;
  float sum[3][3] = {};  // [column type][row type], types (S, 0, 2)
  for (int split = 0; split < p.splits; ++split)
#pragma unroll
    for (int number = 0; number < 9; ++number)
      sum[number / 3][number % 3] += p.partial[(int64_t{split} * 9 + number) * pairs + pair];
  S* const y = static_cast<S*>(p.y) + pair * 9;
#pragma unroll
  for (int row = 0; row < 3; ++row) {
    float of_row[3];  // by column type
#pragma unroll
    for (int column = 0; column < 3; ++column)
      of_row[column] = sum[column][0] + (row == 0 ? sum[column][1] : row == 2 ? sum[column][2] : 0.f);
    y[row * 3] = from_compute<S>(of_row[0] + of_row[1]);
    y[row * 3 + 1] = from_compute<S>(of_row[0]);
    y[row * 3 + 2] = from_compute<S>(of_row[0] + of_row[2]);
  }
}

}  // namespace

// Enough that some 256 blocks, two for each SM of the largest GPUs, share the tiles, eight or more to each.
int upsample_conv2d_weight_splits(const UpsampleConv2dWeightParams& p) {
  return dispatch_factor(p.dtype, p.allow_tf32, [&]<class F>() {
    const dim3 blocks = blocks_of<Traits<F>>(p);
    const int64_t wanted = 256 / (int64_t{blocks.x} * blocks.y), most = tiles_of<Traits<F>>(p) / 8;
    return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  });
}

cudaError_t upsample_conv2d_backward_weight_kernel(const UpsampleConv2dWeightParams& p, cudaStream_t stream) {
  return dispatch_factor(p.dtype, p.allow_tf32, [&]<class F>() {
    using T = Traits<F>;
    const cudaError_t error =
        launch(backward_weight_kernel<T>, blocks_of<T>(p), T::kThreads, T::kSharedBytes, stream, p, tiles_of<T>(p));
    if (error != cudaSuccess) return error;
    const dim3 blocks(static_cast<unsigned>((p.cout * p.cin + 255) / 256));
    return launch(reduce_kernel<typename T::S>, blocks, 256, 0, stream, p);
  });
}

}  // namespace imagegen::cuda
