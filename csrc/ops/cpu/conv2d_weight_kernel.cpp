#include "common/product_conv_weight.h"
#include "ops/conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void conv2d_backward_weight_kernel(const ProductConvWeightParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() { ProductConvWeight<WinogradF4Weight, S>(p).run(); });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
