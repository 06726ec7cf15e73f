// What the hosts of upsample_conv2d on CUDA tell its kernels.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/scalar.h"

namespace imagegen::cuda {

// Images (B, H, W, C) as the kernels read them: the channels of a pixel side by side, every pixel at a multiple of 16
// bytes, so many channels that they fill whole 16 bytes. Strides count elements.
struct PixelImages {
  const void* p;
  int64_t batch_stride, row_stride, pixel_stride;
  int channels;
};

// Any images (B, C, H, W) to [B, H, W, channels], zeros in the channels that they lack.
struct GatherPixelsParams {
  const void* x;
  int64_t stride[4];  // (B, C, H, W), any
  void* y;
  Dtype dtype;
  int64_t batch, cin, height, width, channels;
};
cudaError_t upsample_conv2d_gather_kernel(const GatherPixelsParams&, cudaStream_t);

// The nine products' weights [n block][step of depth][product][n][depth], zeros past the ends: one order for all
// kernels, who take as many n and steps of it as they multiply by. Within a product lie squares of 8 n x 16 bytes of
// depth, the two of a step beside each other, as fragments and wgmma both read them. Sums are taken in double and
// rounded once.
struct PackWeightParams {
  const void* weight;
  int64_t n_stride, depth_stride, row_stride, column_stride;
  void* packed;
  Dtype dtype;
  int64_t n, depth;
  int block;  // n of a block
};
constexpr int kWeightStepBytes = 32;
// The channels of y, or of the gradient of x, that the kernels with the smallest blocks take at a time.
constexpr int kForwardChannels = 32, kBackwardChannels = 64;
// Of the n of a block as few as hold them all, but no fewer than a kernel takes at a time.
inline int weight_block(int64_t n, int least) {
  return n <= 32 && least <= 32 ? 32 : n <= 64 && least <= 64 ? 64 : 128;
}
// Steps of so many bytes of depth, in twos: kernels take one or two of them at a time.
__host__ __device__ constexpr int64_t weight_steps(int64_t depth_bytes) {
  return (depth_bytes + 2 * kWeightStepBytes - 1) / (2 * kWeightStepBytes) * 2;
}
inline int64_t packed_bytes(int64_t n, int64_t depth_bytes, int block) {
  return 9 * ((n + block - 1) / block * block) * weight_steps(depth_bytes) * kWeightStepBytes;
}
cudaError_t upsample_conv2d_pack_kernel(const PackWeightParams&, cudaStream_t);

// y = act(conv3x3(nearest2x(x), weight) + bias), or for the gradient of x its transpose, of x = the gradient of y.
struct UpsampleConv2dParams {
  PixelImages x;
  const void* weight;  // packed
  int weight_block;    // channels of y in one of its blocks
  const void* bias;    // [cout] or null
  void* y;             // (B, cout, H', W'), contiguous or channels_last
  bool y_channels_last;
  Dtype dtype;
  bool allow_tf32;  // of float: one product of tf32 in place of three
  Activation activation;
  int64_t batch, height, width;  // at low resolution
  int64_t cout;                  // channels of y
  int multiprocessors;           // of the GPU
  // Mean and variance of y in each image's groups of channels, where wanted.
  float* moments;  // [batch][groups][2] or null
  int64_t groups;
  void* lots;  // [tiles of y][cout] moments of one channel of one tile each: workspace
};
// Bytes of `lots` for the smallest tiles.
int64_t upsample_conv2d_lots_bytes(const UpsampleConv2dParams&);
// moments from the lots of so many tiles in an image; the kernels below launch it behind themselves.
cudaError_t upsample_conv2d_moments_kernel(const UpsampleConv2dParams&, int64_t tiles, cudaStream_t);
cudaError_t upsample_conv2d_kernel(const UpsampleConv2dParams&, cudaStream_t);
// On sm_90a, in half precision; the second for y in channels_last of an even number of channels, linear or silu.
cudaError_t upsample_conv2d_wgmma_kernel(const UpsampleConv2dParams&, cudaStream_t);
cudaError_t upsample_conv2d_wgmma_passes_kernel(const UpsampleConv2dParams&, cudaStream_t);
cudaError_t upsample_conv2d_backward_input_kernel(const UpsampleConv2dParams&, cudaStream_t);

// The gradient of weight.
struct UpsampleConv2dWeightParams {
  PixelImages x;     // (B, H, W, cin)
  PixelImages grad;  // (B, 2H, 2W, cout)
  float* partial;    // [splits][9][cout][cin]: workspace
  void* y;           // [cout][cin][3][3]
  Dtype dtype;
  bool allow_tf32;
  int64_t batch, height, width, cout, cin;
  int splits;
};
int upsample_conv2d_weight_splits(const UpsampleConv2dWeightParams&);
cudaError_t upsample_conv2d_backward_weight_kernel(const UpsampleConv2dWeightParams&, cudaStream_t);

}  // namespace imagegen::cuda
