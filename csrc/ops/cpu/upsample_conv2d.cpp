#include "ops/upsample_conv2d.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/product_conv_host.h"
#include "common/product_conv_weight.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(ConvAlgorithm upsample_conv2d_algorithm_kernel(const ConvShape&))
IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_kernel(ConvAlgorithm, const ProductConvParams&))
IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_few_kernel(const ProductConvParams&, const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_backward_input_kernel(const ProductConvParams&))
IMAGEGEN_DECLARE_KERNEL(void upsample_conv2d_backward_weight_kernel(const ProductConvWeightParams&))
// Return the bytes of the packed weight, and make it where params.u is given.
IMAGEGEN_DECLARE_KERNEL(int64_t upsample_conv2d_pack_kernel(ConvAlgorithm, const PackWeightParams&))
IMAGEGEN_DECLARE_KERNEL(int64_t upsample_conv2d_backward_input_pack_kernel(const PackWeightParams&))

namespace {

ConvAlgorithm choose(const ConvShape& shape) {
  return IMAGEGEN_PICK_KERNEL(upsample_conv2d_algorithm_kernel, shape.dtype, shape.cin)(shape);
}

const char* name_of(ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::direct: return "upsample_conv2d direct";
    case ConvAlgorithm::large_tiles: return "upsample_conv2d 81 products for 4x4 pixels";
    default: return "upsample_conv2d 25 products for 2x2 pixels";
  }
}

Tensor upsample_conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in,
                           const std::string& activation) {
  const UpsampleConv2dShape s = check_upsample_conv2d(x, weight, bias_in);
  const Activation act = check_activation("upsample_conv2d", "activation", activation);
  const Dtype dtype = check_dtype("upsample_conv2d", "x", x);
  Tensor y = new_empty_4d(x, {s.batch, s.cout, 2 * s.height, 2 * s.width}, is_channels_last(x));
  if (y.numel() == 0) return y;
  ProductConvParams p = product_conv_params(x, dtype, y);
  const auto bias = contiguous(bias_in);
  p.bias = data_of(bias);
  p.activation = act;
  const ConvAlgorithm algorithm = choose(p.shape());
  if (algorithm == ConvAlgorithm::direct) {
    IMAGEGEN_PICK_KERNEL(upsample_conv2d_few_kernel, dtype)(p, pack_weight_params(weight, dtype));
    return y;
  }
  const auto u = packed_weight(name_of(algorithm), weight, dtype, as_it_is, [&](const PackWeightParams& w) {
    return IMAGEGEN_PICK_KERNEL(upsample_conv2d_pack_kernel, dtype, p.cin)(algorithm, w);
  });
  p.u = u->data;
  IMAGEGEN_PICK_KERNEL(upsample_conv2d_kernel, dtype, p.cin)(algorithm, p);
  return y;
}

Tensor upsample_conv2d_backward_input_cpu(const Tensor& grad, const Tensor& weight) {
  const UpsampleConv2dShape s = check_upsample_conv2d_backward_input(grad, weight);
  const Dtype dtype = check_dtype("upsample_conv2d_backward_input", "grad", grad);
  Tensor y = new_empty_4d(grad, {s.batch, s.cin, s.height, s.width}, is_channels_last(grad));
  if (y.numel() == 0) return y;
  ProductConvParams p = product_conv_params(grad, dtype, y);
  p.activation = Activation::linear;
  const auto u = packed_weight("upsample_conv2d_backward_input", weight, dtype, transposed,
                               IMAGEGEN_PICK_KERNEL(upsample_conv2d_backward_input_pack_kernel, dtype, p.cin));
  p.u = u->data;
  IMAGEGEN_PICK_KERNEL(upsample_conv2d_backward_input_kernel, dtype, p.cin)(p);
  return y;
}

Tensor upsample_conv2d_backward_weight_cpu(const Tensor& grad, const Tensor& x) {
  const UpsampleConv2dShape s = check_upsample_conv2d_backward_weight(grad, x);
  Tensor y = new_empty_4d(x, {s.cout, s.cin, 3, 3}, false);
  if (y.numel() == 0) return y;
  const ProductConvWeightParams p =
      product_conv_weight_params(x, grad, check_dtype("upsample_conv2d_backward_weight", "x", x), y);
  IMAGEGEN_PICK_KERNEL(upsample_conv2d_backward_weight_kernel, p.dtype)(p);
  return y;
}

}  // namespace

const char* upsample_conv2d_algorithm_name(const ConvShape& shape) {
  return name_of(choose(shape));
}

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("upsample_conv2d", TORCH_BOX(&upsample_conv2d_cpu));
  m.impl("upsample_conv2d_backward_input", TORCH_BOX(&upsample_conv2d_backward_input_cpu));
  m.impl("upsample_conv2d_backward_weight", TORCH_BOX(&upsample_conv2d_backward_weight_cpu));
}

}  // namespace imagegen
