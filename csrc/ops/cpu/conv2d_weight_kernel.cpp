#include "common/product_conv_weight.h"
#include "ops/conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void conv2d_backward_weight_kernel(const ProductConvWeightParams& p) {
  product_conv_weight<WinogradF4Weight>(p);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
