// upsample_conv2d's CUDA kernels as a program for the sanitizers: the argument is the dtype.
#include <cstdio>
#include <string>
#include <vector>

#include "ops/cuda/upsample_conv2d_params.h"

namespace {

using namespace imagegen;
using namespace imagegen::cuda;

std::vector<unsigned char> ones(int64_t n, Dtype dtype) {
  const int size = dtype == Dtype::bf16 ? 2 : 4;
  std::vector<unsigned char> bytes(n * size);
  for (int64_t i = 0; i < n * size; i += size) bytes[i + size - 1] = 0x3F, bytes[i + size - 2] = 0x80;
  return bytes;
}

}  // namespace

int main(int, char** arguments) {
  const Dtype dtype = std::string(arguments[1]) == "bf16" ? Dtype::bf16 : Dtype::f32;
  const int64_t B = 1, C = 40, O = 24, H = 9, W = 6, pixels = B * H * W;
  const auto x = ones(pixels * C, dtype), weight = ones(O * C * 9, dtype), grad = ones(4 * pixels * O, dtype);
  const auto bias = ones(O, dtype);
  auto gathered = ones(pixels * C, dtype), y = ones(4 * pixels * O, dtype), dx = ones(pixels * C, dtype);
  auto dw = ones(O * C * 9, dtype);
  const int size = dtype == Dtype::bf16 ? 2 : 4;
  bool ran = true;

  const GatherPixelsParams gather{x.data(), {C * H * W, H * W, W, 1}, gathered.data(), dtype, B, C, H, W, C};
  ran &= upsample_conv2d_gather_kernel(gather, nullptr) == cudaSuccess;

  const auto packed = [&](bool transposed, int block) {
    PackWeightParams p{weight.data(), transposed ? 9 : C * 9, transposed ? C * 9 : 9, 3,    1, nullptr,
                       dtype,         transposed ? C : O,     transposed ? O : C,     block};
    auto made = ones(packed_bytes(p.n, p.depth * size, block) / size, dtype);
    p.packed = made.data();
    ran &= upsample_conv2d_pack_kernel(p, nullptr) == cudaSuccess;
    return made;
  };
  for (int multiprocessors : {1, 1000}) {  // wide tiles, small tiles
    const auto forward_weight = packed(false, 32);
    UpsampleConv2dParams p{};
    p.x = {gathered.data(), H * W * C, W * C, C, static_cast<int>(C)};
    p.weight = forward_weight.data(), p.weight_block = 32, p.bias = bias.data(), p.y = y.data();
    p.y_channels_last = multiprocessors == 1, p.dtype = dtype, p.activation = Activation::silu;
    p.batch = B, p.height = H, p.width = W, p.cout = O, p.multiprocessors = multiprocessors;
    float moments[2 * 3];
    std::vector<char> lots(upsample_conv2d_lots_bytes(p));
    p.moments = moments, p.groups = 3, p.lots = lots.data();
    ran &= upsample_conv2d_kernel(p, nullptr) == cudaSuccess;

    if (dtype == Dtype::bf16) {
      ran &= upsample_conv2d_wgmma_kernel(p, nullptr) == cudaSuccess;
      const auto passes_weight = packed(false, 128);
      p.weight = passes_weight.data(), p.weight_block = 128;
      ran &= upsample_conv2d_wgmma_passes_kernel(p, nullptr) == cudaSuccess;
    }

    const auto backward_weight = packed(true, 64);
    p.x = {grad.data(), 4 * H * W * O, 2 * W * O, O, static_cast<int>(O)};
    p.weight = backward_weight.data(), p.weight_block = 64, p.bias = nullptr, p.moments = nullptr, p.y = dx.data(),
    p.activation = Activation::linear;
    p.cout = C;
    ran &= upsample_conv2d_backward_input_kernel(p, nullptr) == cudaSuccess;
  }

  UpsampleConv2dWeightParams p{};
  p.x = {gathered.data(), H * W * C, W * C, C, static_cast<int>(C)};
  p.grad = {grad.data(), 4 * H * W * O, 2 * W * O, O, static_cast<int>(O)};
  p.y = dw.data(), p.dtype = dtype, p.allow_tf32 = true, p.batch = B, p.height = H, p.width = W, p.cout = O, p.cin = C,
  p.splits = 2;
  std::vector<float> partial(p.splits * 9 * O * C);
  p.partial = partial.data();
  ran &= upsample_conv2d_backward_weight_kernel(p, nullptr) == cudaSuccess;
  std::puts(ran ? "ran" : "failed");
}
