#include "ops/conv2d.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/cpu_capability.h"
#include "common/product_conv_host.h"
#include "common/product_conv_weight.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(ConvAlgorithm conv2d_algorithm_kernel(const ConvShape&))
IMAGEGEN_DECLARE_KERNEL(void conv2d_kernel(ConvAlgorithm, const ProductConvParams&))
IMAGEGEN_DECLARE_KERNEL(int64_t conv2d_pack_kernel(ConvAlgorithm, const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(void conv2d_few_kernel(const ProductConvParams&, const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(void conv2d_backward_weight_kernel(const ProductConvWeightParams&))

namespace {

// The weight of the gradient in x: input and output channels change places, and the taps are read from the last.
PackWeightParams turned_around(PackWeightParams p) {
  const int64_t size = p.dtype == Dtype::f64 ? 8 : p.dtype == Dtype::f32 ? 4 : 2;
  p = transposed(p);
  p.w = static_cast<const char*>(p.w) + 2 * (p.w_stride[2] + p.w_stride[3]) * size;
  p.w_stride[2] = -p.w_stride[2], p.w_stride[3] = -p.w_stride[3];
  return p;
}

ConvAlgorithm choose(const ConvShape& shape) {
  return IMAGEGEN_PICK_KERNEL(conv2d_algorithm_kernel, shape.dtype, shape.cin)(shape);
}

const char* name_of(ConvAlgorithm algorithm) {
  constexpr const char* names[] = {"conv2d direct", "conv2d F(2,3) along the rows", "conv2d F(2,3)", "conv2d F(4,3)"};
  return names[static_cast<int>(algorithm)];
}

template <class View>
void run(ProductConvParams& p, const Tensor& weight, const View& view) {
  const ConvAlgorithm algorithm = choose(p.shape());
  if (algorithm == ConvAlgorithm::direct || algorithm == ConvAlgorithm::rows) {
    IMAGEGEN_PICK_KERNEL(conv2d_few_kernel, p.dtype)(p, view(pack_weight_params(weight, p.dtype)));
    return;
  }
  const auto u = packed_weight(name_of(algorithm), weight, p.dtype, view, [&](const PackWeightParams& w) {
    return IMAGEGEN_PICK_KERNEL(conv2d_pack_kernel, p.dtype, p.cin)(algorithm, w);
  });
  p.u = u->data;
  IMAGEGEN_PICK_KERNEL(conv2d_kernel, p.dtype, p.cin)(algorithm, p);
}

// t as y lies in memory; it has y's shape.
std::optional<Tensor> like(const std::optional<Tensor>& t, const Tensor& y) {
  using torch::headeronly::MemoryFormat;
  bool same = true;
  for (int d = 0; t && d < 4; ++d) same &= t->stride(d) == y.stride(d);
  if (same) return t;
  return torch::stable::contiguous(*t, is_channels_last(y) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in,
                const std::optional<Tensor>& residual_in, const std::optional<Tensor>& scale_in,
                const std::optional<Tensor>& shift_in, Activation x_act, Activation act) {
  const Dtype dtype = check_dtype("conv2d", "x", x);
  Tensor y = new_empty_4d(x, {x.size(0), weight.size(0), x.size(2), x.size(3)}, is_channels_last(x));
  if (y.numel() == 0) return y;
  ProductConvParams p = product_conv_params(x, dtype, y);
  const auto bias = contiguous(bias_in), residual = like(residual_in, y);
  const auto scale = in_compute_type(scale_in, dtype), shift = in_compute_type(shift_in, dtype);
  p.bias = data_of(bias), p.residual = data_of(residual), p.x_scale = data_of(scale), p.x_shift = data_of(shift);
  p.x_activation = x_act, p.activation = act;
  run(p, weight, as_it_is);
  return y;
}

Tensor conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift, const std::string& input_activation,
                  const std::string& activation) {
  check_conv2d(x, weight, bias, residual, scale, shift);
  const Activation x_act = check_activation("conv2d", "input_activation", input_activation);
  const Activation act = check_activation("conv2d", "activation", activation);
  return convolve(x, weight, bias, residual, scale, shift, x_act, act);
}

Tensor conv2d_plain_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_conv3x3("conv2d", x, weight, bias);
  return convolve(x, weight, bias, {}, {}, {}, Activation::linear, Activation::linear);
}

Tensor conv2d_backward_input_cpu(const Tensor& grad, const Tensor& weight) {
  check_conv2d_backward_input(grad, weight);
  Tensor y = new_empty_4d(grad, {grad.size(0), weight.size(1), grad.size(2), grad.size(3)}, is_channels_last(grad));
  if (y.numel() == 0) return y;
  ProductConvParams p = product_conv_params(grad, check_dtype("conv2d_backward_input", "grad", grad), y);
  run(p, weight, turned_around);
  return y;
}

Tensor conv2d_backward_weight_cpu(const Tensor& grad, const Tensor& x) {
  check_conv2d_backward_weight(grad, x);
  Tensor y = new_empty_4d(x, {grad.size(1), x.size(1), 3, 3}, false);
  if (y.numel() == 0) return y;
  const ProductConvWeightParams p =
      product_conv_weight_params(x, grad, check_dtype("conv2d_backward_weight", "x", x), y);
  IMAGEGEN_PICK_KERNEL(conv2d_backward_weight_kernel, p.dtype)(p);
  return y;
}

}  // namespace

const char* conv2d_algorithm_name(const ConvShape& shape) {
  return name_of(choose(shape));
}

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_cpu));
  m.impl("conv2d_plain", TORCH_BOX(&conv2d_plain_cpu));
  m.impl("conv2d_backward_input", TORCH_BOX(&conv2d_backward_input_cpu));
  m.impl("conv2d_backward_weight", TORCH_BOX(&conv2d_backward_weight_cpu));
}

}  // namespace imagegen
