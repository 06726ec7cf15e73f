// What upsample_conv2d's products ask for: pixels with their channels side by side, and weights summed and in order.
#include "common/launch.cuh"
#include "common/scalar.cuh"
#include "ops/cuda/upsample_conv2d_params.h"

namespace imagegen::cuda {
namespace {

constexpr int kTile = 32, kRows = 8;  // a block turns 32 pixels x 32 channels, eight rows of threads at a time

// Along pixels where reading, along channels where writing: of x in NCHW both are whole sectors.
template <class S>
__global__ void __launch_bounds__(kTile* kRows) gather_kernel(const __grid_constant__ GatherPixelsParams p) {
  __shared__ S turned[kTile][kTile + 2];
  const int64_t pixels = p.height * p.width, tiles = (pixels + kTile - 1) / kTile;
  const int64_t b = blockIdx.x / tiles, pixel0 = blockIdx.x % tiles * kTile, c0 = int64_t{blockIdx.y} * kTile;
  const int along = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const int64_t pixel = pixel0 + along;
  const S* const x =
      static_cast<const S*>(p.x) + b * p.stride[0] + pixel / p.width * p.stride[2] + pixel % p.width * p.stride[3];
  for (int c = row; c < kTile; c += kRows)
    if (pixel < pixels) turned[along][c] = c0 + c < p.cin ? x[(c0 + c) * p.stride[1]] : S{};
  __syncthreads();
  S* const y = static_cast<S*>(p.y) + b * pixels * p.channels;
  for (int i = row; i < kTile; i += kRows)
    if (pixel0 + i < pixels && c0 + along < p.channels) y[(pixel0 + i) * p.channels + c0 + along] = turned[i][along];
}

template <class S>
constexpr int kWord = 4 / static_cast<int>(sizeof(S));  // elements of 32 bits

// A thread makes one word of each of the nine products. Words of a block's n x one step: of 8 n, lane 4 (n % 8) + t has
// depth kWord t + e, first of the first half of the step, then of the second.
template <class S>
__global__ void __launch_bounds__(256) pack_kernel(const __grid_constant__ PackWeightParams p, int64_t words) {
  constexpr int kStep = kWeightStepBytes / sizeof(S);
  const int64_t word = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (word >= words) return;
  const int words_of_step = p.block * 8;
  const int64_t steps = weight_steps(p.depth * sizeof(S));
  const int in_step = static_cast<int>(word % words_of_step), lane = in_step % 32;
  const int64_t step = word / words_of_step % steps, block = word / words_of_step / steps;
  const int64_t n = block * p.block + in_step / 64 * 8 + lane / 4;
  const int64_t depth = step * kStep + in_step / 32 % 2 * (kStep / 2) + lane % 4 * kWord<S>;

  double sums[kWord<S>][3][3];  // [element][column type][row type], types (S, 0, 2)
#pragma unroll
  for (int e = 0; e < kWord<S>; ++e) {
    double w[3][3] = {};  // [row][column]
    if (n < p.n && depth + e < p.depth) {
      const S* const from = static_cast<const S*>(p.weight) + n * p.n_stride + (depth + e) * p.depth_stride;
#pragma unroll
      for (int i = 0; i < 9; ++i) w[i / 3][i % 3] = to_compute(from[i / 3 * p.row_stride + i % 3 * p.column_stride]);
    }
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      const double whole = w[row][0] + w[row][1] + w[row][2];
      w[row][1] = w[row][0], w[row][0] = whole;  // now by column type
    }
#pragma unroll
    for (int column = 0; column < 3; ++column) {
      sums[e][column][0] = w[0][column] + w[1][column] + w[2][column];
      sums[e][column][1] = w[0][column], sums[e][column][2] = w[2][column];
    }
  }

  struct Word {
    S at[kWord<S>];
  };
  static_assert(sizeof(Word) == 4, "a word");
  Word* const packed = static_cast<Word*>(p.packed) + word / words_of_step * 9 * words_of_step + in_step;
#pragma unroll
  for (int column = 0; column < 3; ++column)
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      Word made;
#pragma unroll
      for (int e = 0; e < kWord<S>; ++e) made.at[e] = from_compute<S>(static_cast<float>(sums[e][column][row]));
      packed[(3 * column + row) * words_of_step] = made;
    }
}

}  // namespace

cudaError_t upsample_conv2d_gather_kernel(const GatherPixelsParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.height * p.width + kTile - 1) / kTile * p.batch;
  if (tiles == 0 || p.channels == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>((p.channels + kTile - 1) / kTile));
  return dispatch_element(p.dtype,
                          [&]<class S>() { return launch(gather_kernel<S>, grid, kTile * kRows, 0, stream, p); });
}

cudaError_t upsample_conv2d_pack_kernel(const PackWeightParams& p, cudaStream_t stream) {
  return dispatch_element(p.dtype, [&]<class S>() {
    const int64_t words = packed_bytes(p.n, p.depth * sizeof(S), p.block) / 9 / 4;
    if (words == 0) return cudaSuccess;
    return launch(pack_kernel<S>, dim3(static_cast<unsigned>((words + 255) / 256)), 256, 0, stream, p, words);
  });
}

}  // namespace imagegen::cuda
