#include "ops/upsample_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "common/allow_tf32.h"
#include "common/ceil_div.h"
#include "common/cuda_stream.h"
#include "ops/cuda/upsample_conv2d_params.h"

namespace imagegen {
namespace {

using cuda::PixelImages;

constexpr int kPieceBytes = 16;

// In the words of _declines in imagegen/ops/upsample_conv2d.py.
void check_kernel_takes(const char* op, const char* argument, const Tensor& t) {
  IMAGEGEN_CHECK(t.scalar_type() != ScalarType::Double, op, ": the cuda kernel takes float32, bfloat16 or float16, ",
                 argument, " is torch.float64");
}

int64_t pack_of(const Tensor& t) {
  return kPieceBytes / t.element_size();
}

Tensor new_like(const Tensor& t, int64_t size) {
  return torch::stable::empty({size}, t.scalar_type(), std::nullopt, t.device());
}

// x as the kernels read it, and what holds it: x itself where its channels lie so, else a copy. Of x in NCHW the copy
// moves twice x's bytes, where the op moves at least five times as many and its blocks read each of x's pixels once for
// every 32 channels of y: 10 of 160 us predicted for (1, 512, 128, 128) on H200.
struct Images {
  PixelImages pixels;
  Tensor holder;
};
Images as_pixels(const Tensor& x, Dtype dtype, cudaStream_t stream) {
  const int64_t pack = pack_of(x), C = x.size(1), H = x.size(2), W = x.size(3);
  const auto whole = [&](int64_t n) { return n % pack == 0; };
  const bool in_reach = (H * x.stride(2) + W * x.stride(3)) / pack < INT32_MAX;
  if (x.stride(1) == 1 && whole(C) && whole(x.stride(0)) && whole(x.stride(2)) && whole(x.stride(3)) && in_reach &&
      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kPieceBytes == 0)
    return {{x.const_data_ptr(), x.stride(0), x.stride(2), x.stride(3), static_cast<int>(C)}, x};
  const int64_t channels = cuda::round_up(C, pack);
  const Tensor copy = new_like(x, x.size(0) * H * W * channels);
  const cuda::GatherPixelsParams p{x.const_data_ptr(),
                                   {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
                                   copy.mutable_data_ptr(),
                                   dtype,
                                   x.size(0),
                                   C,
                                   H,
                                   W,
                                   channels};
  check_launch("upsample_conv2d", cuda::upsample_conv2d_gather_kernel(p, stream));
  return {{copy.const_data_ptr(), H * W * channels, W * channels, channels, static_cast<int>(channels)}, copy};
}

// The nine products' weights, of the transposed convolution for the gradient of x. What is not handed in packed is
// packed at every call: looking whether a weight has changed reads as much of it as packing does and then has half of
// the writing to save, and version counters miss writes through .data, those of other libraries and replayed graphs.
// Predicted on H200, at 4.3 TB/s and 2 us for the launch, as a share of the op:
//   (1, 512, 128, 128)  4.2 of 100 us  4 %       (1, 256, 512, 512)  2.6 of 401 us  0.6 %
//   (1, 512, 256, 256)  4.2 of 401 us  1 %       (8, 320, 32, 32)    3.0 of  25 us  12 %
Tensor pack_weight(const Tensor& weight, bool transposed, Dtype dtype, cudaStream_t stream) {
  const int n = transposed ? 1 : 0, depth = 1 - n;
  const int block = cuda::weight_block(weight.size(n), transposed ? cuda::kBackwardChannels : cuda::kForwardChannels);
  const int64_t bytes = cuda::packed_bytes(weight.size(n), weight.size(depth) * weight.element_size(), block);
  const Tensor packed = new_like(weight, bytes / weight.element_size());
  const cuda::PackWeightParams p{weight.const_data_ptr(),
                                 weight.stride(n),
                                 weight.stride(depth),
                                 weight.stride(2),
                                 weight.stride(3),
                                 packed.mutable_data_ptr(),
                                 dtype,
                                 weight.size(n),
                                 weight.size(depth),
                                 block};
  check_launch("upsample_conv2d", cuda::upsample_conv2d_pack_kernel(p, stream));
  return packed;
}

// What forward and gradient of x, which writes y's place, have in common.
cuda::UpsampleConv2dParams params_of(const Images& x, const Tensor& packed, int least_block, const Tensor& y,
                                     Dtype dtype, const UpsampleConv2dShape& s, const CudaScope& scope) {
  cuda::UpsampleConv2dParams p{};
  p.x = x.pixels;
  p.weight = packed.const_data_ptr();
  p.weight_block = cuda::weight_block(y.size(1), least_block);
  p.y = y.mutable_data_ptr();
  p.y_channels_last = is_channels_last(y);
  p.dtype = dtype, p.allow_tf32 = allow_tf32(y);
  p.batch = s.batch, p.height = s.height, p.width = s.width, p.cout = y.size(1);
  p.multiprocessors = scope.multiprocessors();
  return p;
}

// The kernel of the least predicted time. On sm_100 it is mma, HMMA there, at a fraction of what tcgen05 multiplies,
// which triton's products are. Predicted, not measured, for (1, 512, 128, 128) in bf16 on H200: mma
// 197 us, wgmma 129, wgmma in three passes 100; for (1, 256, 512, 512) four times as long. The channels of y count in
// whole blocks and those in whole waves of one to each multiprocessor: (8, 320, 32, 32) is two waves of 128 to the
// passes, which lose to five waves of 32. The blocks of wgmma, of 16 x 8 pixels, have to fill the GPU: below, mma has
// smaller ones.
using Forward = cudaError_t (*)(const cuda::UpsampleConv2dParams&, cudaStream_t);
Forward choose_forward(const UpsampleConv2dShape& s, Dtype dtype, Activation act, bool channels_last,
                       const CudaScope& scope) {
  constexpr int passes = 128, at_once = cuda::kForwardChannels;  // channels of y of a block
  const int64_t tiles = s.batch * cuda::ceil_div(s.height, 16) * cuda::ceil_div(s.width, 8);
  const auto blocks = [&](int channels) { return cuda::ceil_div(s.cout, channels); };
  const auto fills_gpu = [&](int channels) {
    return s.height > 8 && tiles * blocks(channels) >= scope.multiprocessors();
  };
  const bool has_wgmma = scope.runs_sm90a() && dtype != Dtype::f32;
  const bool passes_take = channels_last && s.cout % 2 == 0 && (act == Activation::linear || act == Activation::silu);
  const auto waves = [&](int channels) { return cuda::ceil_div(tiles * blocks(channels), scope.multiprocessors()); };
  const bool passes_win = 100 * waves(passes) * passes <= 129 * waves(at_once) * at_once;
  if (has_wgmma && passes_take && passes_win && fills_gpu(passes)) return cuda::upsample_conv2d_wgmma_passes_kernel;
  if (has_wgmma && fills_gpu(at_once)) return cuda::upsample_conv2d_wgmma_kernel;
  return cuda::upsample_conv2d_kernel;
}

// y, and its moments in so many groups of channels where there are any. packed() is the packed weight.
template <class Packed>
std::tuple<Tensor, Tensor> forward(const UpsampleConv2dShape& s, const Tensor& x, const Packed& packed,
                                   const std::optional<Tensor>& bias_in, const std::string& activation,
                                   int64_t groups) {
  constexpr const char* op = "upsample_conv2d";
  const Activation act = check_activation(op, "activation", activation);
  const Dtype dtype = check_dtype(op, "x", x);
  check_kernel_takes(op, "x", x);
  const CudaScope scope(x);
  Tensor y = new_empty_4d(x, {s.batch, s.cout, 2 * s.height, 2 * s.width}, is_channels_last(x));
  Tensor moments = torch::stable::empty({s.batch, groups, 2}, ScalarType::Float, std::nullopt, x.device());
  if (y.numel() == 0) return {y, torch::stable::zero_(moments)};
  const Images images = as_pixels(x, dtype, scope.stream);
  const std::optional<Tensor> bias = bias_in ? std::optional(torch::stable::contiguous(*bias_in)) : std::nullopt;
  const Tensor weight = packed(dtype, scope.stream);
  cuda::UpsampleConv2dParams p = params_of(images, weight, cuda::kForwardChannels, y, dtype, s, scope);
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.activation = act;
  std::optional<Tensor> lots;
  if (groups > 0) {
    lots = torch::stable::empty({cuda::upsample_conv2d_lots_bytes(p)}, ScalarType::Byte, std::nullopt, x.device());
    p.moments = static_cast<float*>(moments.mutable_data_ptr()), p.groups = groups, p.lots = lots->mutable_data_ptr();
  }
  check_launch(op, choose_forward(s, dtype, act, is_channels_last(y), scope)(p, scope.stream));
  return {y, moments};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const std::string& activation, int64_t groups) {
  const auto packed = [&](Dtype dtype, cudaStream_t stream) { return pack_weight(weight, false, dtype, stream); };
  return forward(check_upsample_conv2d(x, weight, bias), x, packed, bias, activation, groups);
}

Tensor upsample_conv2d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::string& activation) {
  return std::get<0>(forward(x, weight, bias, activation, 0));
}

std::tuple<Tensor, Tensor> upsample_conv2d_moments_cuda(const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias,
                                                        const std::string& activation, int64_t groups) {
  check_upsample_conv2d_groups(groups, check_upsample_conv2d(x, weight, bias).cout);
  return forward(x, weight, bias, activation, groups);
}

Tensor upsample_conv2d_pack_weight_cuda(const Tensor& weight) {
  constexpr const char* op = "upsample_conv2d_pack_weight";
  check_upsample_conv2d_weight(op, weight);
  check_kernel_takes(op, "weight", weight);
  const CudaScope scope(weight);
  return pack_weight(weight, false, check_dtype(op, "weight", weight), scope.stream);
}

std::tuple<Tensor, Tensor> upsample_conv2d_packed_cuda(const Tensor& x, const Tensor& weight,
                                                       const std::optional<Tensor>& bias, const std::string& activation,
                                                       int64_t cout, int64_t groups) {
  const UpsampleConv2dShape s = check_upsample_conv2d_packed(x, weight, bias, cout);
  const int64_t bytes =
      cuda::packed_bytes(cout, s.cin * x.element_size(), cuda::weight_block(cout, cuda::kForwardChannels));
  IMAGEGEN_CHECK(weight.dim() == 1 && weight.is_contiguous() && weight.size(0) * x.element_size() == bytes,
                 "upsample_conv2d: packed_weight must be what upsample_conv2d_pack_weight makes of a weight of shape (",
                 cout, ", ", s.cin, ", 3, 3), got a tensor of shape ", shape_string(weight));
  IMAGEGEN_CHECK(reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % kPieceBytes == 0,
                 "upsample_conv2d: packed_weight must begin at a multiple of ", kPieceBytes, " bytes");
  if (groups != 0) check_upsample_conv2d_groups(groups, cout);
  return forward(s, x, [&](Dtype, cudaStream_t) { return weight; }, bias, activation, groups);
}

Tensor upsample_conv2d_backward_input_cuda(const Tensor& grad, const Tensor& weight) {
  constexpr const char* op = "upsample_conv2d_backward_input";
  const UpsampleConv2dShape s = check_upsample_conv2d_backward_input(grad, weight);
  const Dtype dtype = check_dtype(op, "grad", grad);
  check_kernel_takes(op, "grad", grad);
  const CudaScope scope(grad);
  Tensor y = new_empty_4d(grad, {s.batch, s.cin, s.height, s.width}, is_channels_last(grad));
  if (y.numel() == 0) return y;
  const Images images = as_pixels(grad, dtype, scope.stream);
  const Tensor packed = pack_weight(weight, true, dtype, scope.stream);
  const cuda::UpsampleConv2dParams p = params_of(images, packed, cuda::kBackwardChannels, y, dtype, s, scope);
  check_launch(op, cuda::upsample_conv2d_backward_input_kernel(p, scope.stream));
  return y;
}

Tensor upsample_conv2d_backward_weight_cuda(const Tensor& grad, const Tensor& x) {
  constexpr const char* op = "upsample_conv2d_backward_weight";
  const UpsampleConv2dShape s = check_upsample_conv2d_backward_weight(grad, x);
  const Dtype dtype = check_dtype(op, "x", x);
  check_kernel_takes(op, "x", x);
  const CudaScope scope(x);
  Tensor y = new_empty_4d(x, {s.cout, s.cin, 3, 3}, false);
  if (y.numel() == 0) return y;
  const Images images = as_pixels(x, dtype, scope.stream), grads = as_pixels(grad, dtype, scope.stream);
  cuda::UpsampleConv2dWeightParams p{images.pixels, grads.pixels,  nullptr, y.mutable_data_ptr(),
                                     dtype,         allow_tf32(x), s.batch, s.height,
                                     s.width,       s.cout,        s.cin,   1};
  p.splits = cuda::upsample_conv2d_weight_splits(p);
  const Tensor partial =
      torch::stable::empty({p.splits * 9 * s.cout * s.cin}, ScalarType::Float, std::nullopt, x.device());
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  check_launch(op, cuda::upsample_conv2d_backward_weight_kernel(p, scope.stream));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CUDA, m) {
  m.impl("upsample_conv2d", TORCH_BOX(&upsample_conv2d_cuda));
  m.impl("upsample_conv2d_moments", TORCH_BOX(&upsample_conv2d_moments_cuda));
  m.impl("upsample_conv2d_pack_weight", TORCH_BOX(&upsample_conv2d_pack_weight_cuda));
  m.impl("upsample_conv2d_packed", TORCH_BOX(&upsample_conv2d_packed_cuda));
  m.impl("upsample_conv2d_backward_input", TORCH_BOX(&upsample_conv2d_backward_input_cuda));
  m.impl("upsample_conv2d_backward_weight", TORCH_BOX(&upsample_conv2d_backward_weight_cuda));
}

}  // namespace imagegen
