#include "common/few_channels.h"
#include "ops/upsample_conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void upsample_conv2d_few_kernel(const ProductConvParams& p, const PackWeightParams& w) {
  few_channels<UpsampleFew>(p, w);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
