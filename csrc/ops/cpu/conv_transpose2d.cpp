#include "ops/conv_transpose2d.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/few_channels.h"
#include "common/product_conv_host.h"
#include "common/product_conv_weight.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(ConvAlgorithm conv_transpose2d_algorithm_kernel(int64_t kernel, const ConvShape&))
IMAGEGEN_DECLARE_KERNEL(void conv_transpose2d_kernel(int64_t kernel, ConvAlgorithm, const ProductConvParams&))
IMAGEGEN_DECLARE_KERNEL(int64_t conv_transpose2d_pack_kernel(int64_t kernel, ConvAlgorithm, const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(void conv_transpose2d_few_kernel(int64_t kernel, const ProductConvParams&,
                                                         const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(ConvAlgorithm conv_transpose2d_backward_input_algorithm_kernel(int64_t kernel,
                                                                                       const ConvShape&))
IMAGEGEN_DECLARE_KERNEL(void conv_transpose2d_backward_input_kernel(int64_t kernel, ConvAlgorithm,
                                                                    const ProductConvParams&))
IMAGEGEN_DECLARE_KERNEL(int64_t conv_transpose2d_backward_input_pack_kernel(int64_t kernel, ConvAlgorithm,
                                                                            const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(void conv_transpose2d_backward_weight_kernel(int64_t kernel, const ProductConvWeightParams&))

namespace {

// Generators make images by the batch, and read each weight once for all of them. So the choice is made for sixteen
// images, one below the other, however many there are.
ConvShape of_sixteen(ConvShape shape) {
  shape.out_h *= 16;
  return shape;
}

ConvAlgorithm choose(int64_t kernel, const ConvShape& shape) {
  return IMAGEGEN_PICK_KERNEL(conv_transpose2d_algorithm_kernel, shape.dtype, shape.cin)(kernel, of_sixteen(shape));
}

const char* name_of(ConvAlgorithm algorithm) {
  if (algorithm == ConvAlgorithm::direct) return "conv_transpose2d direct";
  return algorithm == ConvAlgorithm::large_tiles ? "conv_transpose2d F(4,2)" : "conv_transpose2d F(2,2)";
}

Tensor conv_transpose2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in,
                            std::vector<int64_t> output_padding, const std::optional<Tensor>& scale_in,
                            const std::optional<Tensor>& shift_in, const std::string& activation) {
  const ConvTranspose2dSize size = check_conv_transpose2d(x, weight, bias_in, output_padding, scale_in, shift_in);
  const Activation act = check_activation("conv_transpose2d", "activation", activation);
  const Dtype dtype = check_dtype("conv_transpose2d", "x", x);
  Tensor y =
      new_empty_4d(x, {x.size(0), weight.size(1), size.out_h(x.size(2)), size.out_w(x.size(3))}, is_channels_last(x));
  if (y.numel() == 0) return y;
  ProductConvParams p = product_conv_params(x, dtype, y);
  const auto bias = contiguous(bias_in);
  const auto scale = in_compute_type(scale_in, dtype), shift = in_compute_type(shift_in, dtype);
  p.bias = data_of(bias), p.scale = data_of(scale), p.shift = data_of(shift);
  p.activation = act;
  const ConvAlgorithm algorithm = choose(size.kernel, p.shape());
  // The op's weight is (C, Cout, k, k), the engine's (cout, cin, k, k).
  if (algorithm == ConvAlgorithm::direct) {
    IMAGEGEN_PICK_KERNEL(conv_transpose2d_few_kernel, dtype)
    (size.kernel, p, transposed(pack_weight_params(weight, dtype)));
    return y;
  }
  const auto u = packed_weight(name_of(algorithm), weight, dtype, transposed, [&](const PackWeightParams& w) {
    return IMAGEGEN_PICK_KERNEL(conv_transpose2d_pack_kernel, dtype, p.cin)(size.kernel, algorithm, w);
  });
  p.u = u->data;
  IMAGEGEN_PICK_KERNEL(conv_transpose2d_kernel, dtype, p.cin)(size.kernel, algorithm, p);
  return y;
}

Tensor conv_transpose2d_backward_input_cpu(const Tensor& grad, const Tensor& weight,
                                           std::vector<int64_t> output_padding) {
  const std::vector<int64_t> shape = check_conv_transpose2d_backward_input(grad, weight, output_padding);
  const Dtype dtype = check_dtype("conv_transpose2d_backward_input", "grad", grad);
  Tensor y = new_empty_4d(grad, shape, is_channels_last(grad));
  if (y.numel() == 0) return y;
  ProductConvParams p = product_conv_params(grad, dtype, y);
  const int64_t kernel = weight.size(2);
  const auto algorithm = IMAGEGEN_PICK_KERNEL(conv_transpose2d_backward_input_algorithm_kernel, dtype, p.cin)(
      kernel, of_sixteen(p.shape()));
  const char* name = algorithm == ConvAlgorithm::large_tiles ? "conv_transpose2d_backward_input F(4,2)"
                                                             : "conv_transpose2d_backward_input F(2,2)";
  const auto u = packed_weight(name, weight, dtype, as_it_is, [&](const PackWeightParams& w) {
    return IMAGEGEN_PICK_KERNEL(conv_transpose2d_backward_input_pack_kernel, dtype, p.cin)(kernel, algorithm, w);
  });
  p.u = u->data;
  IMAGEGEN_PICK_KERNEL(conv_transpose2d_backward_input_kernel, dtype, p.cin)(kernel, algorithm, p);
  return y;
}

Tensor conv_transpose2d_backward_weight_cpu(const Tensor& grad, const Tensor& x, int64_t kernel,
                                            std::vector<int64_t> output_padding) {
  check_conv_transpose2d_backward_weight(grad, x, kernel, output_padding);
  Tensor y = new_empty_4d(x, {x.size(1), grad.size(1), kernel, kernel}, false);
  if (y.numel() == 0) return y;
  // The weight's gradient in a strided convolution from y to x.
  const ProductConvWeightParams p =
      product_conv_weight_params(grad, x, check_dtype("conv_transpose2d_backward_weight", "x", x), y);
  IMAGEGEN_PICK_KERNEL(conv_transpose2d_backward_weight_kernel, p.dtype)(kernel, p);
  return y;
}

}  // namespace

const char* conv_transpose2d_algorithm_name(int64_t kernel, const ConvShape& shape) {
  return name_of(choose(kernel, shape));
}

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("conv_transpose2d", TORCH_BOX(&conv_transpose2d_cpu));
  m.impl("conv_transpose2d_backward_input", TORCH_BOX(&conv_transpose2d_backward_input_cpu));
  m.impl("conv_transpose2d_backward_weight", TORCH_BOX(&conv_transpose2d_backward_weight_cpu));
}

}  // namespace imagegen
