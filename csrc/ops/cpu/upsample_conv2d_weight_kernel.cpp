#include "common/product_conv_weight.h"
#include "ops/upsample_conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void upsample_conv2d_backward_weight_kernel(const ProductConvWeightParams& p) {
  product_conv_weight<UpsampleWeight>(p);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
