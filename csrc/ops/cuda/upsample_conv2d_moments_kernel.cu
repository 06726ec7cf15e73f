// What upsample_conv2d's forward leaves of each channel of each tile of y, together: mean and variance of every group
// of channels, for the normalisation that follows.
//
// Predicted for (1, 512, 128, 128) and 32 groups on H200: 0.8 MB and a launch, 4 us, where reading y takes 16.
#include "common/ceil_div.h"
#include "common/launch.cuh"
#include "common/moments.cuh"
#include "ops/cuda/upsample_conv2d_params.h"

namespace imagegen::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kSmallestTile = 8;  // of the forward kernels, in pixels of x, along each axis

// A block merges the lots of one group of one image, in an order that their number decides.
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const __grid_constant__ UpsampleConv2dParams p, int64_t tiles) {
  __shared__ Moments<float> of_warp[kWarps];
  const int64_t b = blockIdx.x / p.groups, g = blockIdx.x % p.groups;
  const unsigned channels = p.cout / p.groups, count = tiles * channels;
  const Moments<float>* const lots = static_cast<const Moments<float>*>(p.lots) + b * tiles * p.cout + g * channels;
  Moments<float> m{};
  for (unsigned i = threadIdx.x; i < count; i += kThreads) m = merge(m, lots[i / channels * p.cout + i % channels]);
  const int lane = threadIdx.x % 32;
  for (int step = 16; step > 0; step /= 2) m = merge(m, exchange(m, lane ^ step));
  if (lane == 0) of_warp[threadIdx.x / 32] = m;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) m = merge(m, of_warp[warp]);
  p.moments[2 * blockIdx.x] = m.mean;
  p.moments[2 * blockIdx.x + 1] = m.m2 / m.n;
}

}  // namespace

int64_t upsample_conv2d_lots_bytes(const UpsampleConv2dParams& p) {
  const int64_t tiles = ceil_div(p.height, kSmallestTile) * ceil_div(p.width, kSmallestTile);
  return p.batch * tiles * p.cout * int64_t{sizeof(Moments<float>)};
}

cudaError_t upsample_conv2d_moments_kernel(const UpsampleConv2dParams& p, int64_t tiles, cudaStream_t stream) {
  return launch(moments_kernel, dim3(static_cast<unsigned>(p.batch * p.groups)), kThreads, 0, stream, p, tiles);
}

}  // namespace imagegen::cuda
