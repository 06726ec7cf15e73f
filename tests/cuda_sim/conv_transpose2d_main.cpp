// conv_transpose2d's CUDA kernel as a program for the sanitizers: arguments are the dtype and the channels.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ops/cuda/conv_transpose2d_params.h"

namespace imagegen::cuda {
cudaError_t conv_transpose2d_kernel(const ConvTranspose2dParams&, cudaStream_t);
}  // namespace imagegen::cuda

int main(int, char** arguments) {
  using namespace imagegen;
  const bool half = std::string(arguments[1]) == "bf16";
  const int64_t C = std::atoi(arguments[2]), N = 40, B = 2, H = 5, W = 9, size = half ? 2 : 4;
  const auto ones = [&](int64_t n) {
    std::vector<unsigned char> bytes(n * size);
    for (int64_t i = 0; i < n * size; i += size) bytes[i + size - 1] = 0x3F, bytes[i + size - 2] = 0x80;
    return bytes;
  };
  auto x = ones(B * C * H * W), weight = ones(C * N * 9), bias = ones(N), y = ones(B * N * 4 * H * W);

  ConvTranspose2dParams p{};
  p.x = x.data(), p.weight = weight.data(), p.bias = bias.data(), p.y = y.data();
  p.dtype = half ? Dtype::bf16 : Dtype::f32;
  const int64_t x_stride[] = {C * H * W, 1, C * W, C}, y_stride[] = {N * 4 * H * W, 1, N * 2 * W, N};
  for (int d = 0; d < 4; ++d) p.x_stride[d] = x_stride[d], p.y_stride[d] = y_stride[d];
  p.batch = B, p.cin = C, p.cout = N, p.height = H, p.width = W, p.out_h = 2 * H, p.out_w = 2 * W;
  p.kernel = 3;
  p.activation = Activation::silu;
  std::puts(cuda::conv_transpose2d_kernel(p, nullptr) == cudaSuccess ? "ran" : "failed");
}
