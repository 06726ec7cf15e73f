#include "ops/conv_transpose2d.h"

#include <torch/csrc/stable/library.h>

#include "common/allow_tf32.h"
#include "common/cuda_stream.h"
#include "ops/cuda/conv_transpose2d_params.h"

namespace imagegen {

namespace cuda {
cudaError_t conv_transpose2d_kernel(const ConvTranspose2dParams&, cudaStream_t);
}  // namespace cuda

namespace {

Tensor conv_transpose2d_cuda(const Tensor& x, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                             std::vector<int64_t> output_padding, const std::optional<Tensor>& scale_in,
                             const std::optional<Tensor>& shift_in, const std::string& activation) {
  constexpr const char* op = "conv_transpose2d";
  const ConvTranspose2dSize size = check_conv_transpose2d(x, weight_in, bias_in, output_padding, scale_in, shift_in);
  const Activation act = check_activation(op, "activation", activation);
  // In the words of _declines in imagegen/ops/conv_transpose2d.py.
  IMAGEGEN_CHECK(x.scalar_type() != ScalarType::Double, op,
                 ": the cuda kernel takes float32, bfloat16 or float16, x is torch.float64");
  const CudaScope scope(x);
  Tensor y = new_empty_4d(x, {x.size(0), weight_in.size(1), size.out_h(x.size(2)), size.out_w(x.size(3))},
                          is_channels_last(x));
  if (y.numel() == 0) return y;
  // The kernel reads the output's channels side by side: no copy of a channels_last weight.
  const Tensor weight = torch::stable::contiguous(weight_in, torch::headeronly::MemoryFormat::ChannelsLast);
  const auto in_row = [](const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(*t)) : std::nullopt;
  };
  const auto bias = in_row(bias_in), scale = in_row(scale_in), shift = in_row(shift_in);

  ConvTranspose2dParams p{};
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.y = y.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) p.x_stride[d] = x.stride(d), p.y_stride[d] = y.stride(d);
  if (bias) p.bias = bias->const_data_ptr();
  if (scale) p.scale = scale->const_data_ptr(), p.scale_dtype = check_dtype(op, "scale", *scale);
  if (shift) p.shift = shift->const_data_ptr(), p.shift_dtype = check_dtype(op, "shift", *shift);
  p.dtype = check_dtype(op, "x", x), p.allow_tf32 = allow_tf32(x);
  p.batch = x.size(0), p.cin = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.cout = y.size(1), p.out_h = y.size(2), p.out_w = y.size(3);
  p.kernel = static_cast<int>(size.kernel);
  p.activation = act;
  check_launch(op, cuda::conv_transpose2d_kernel(p, scope.stream));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CUDA, m) {
  m.impl("conv_transpose2d", TORCH_BOX(&conv_transpose2d_cuda));
}

}  // namespace imagegen
