#include "common/few_channels.h"
#include "common/few_inputs.h"
#include "ops/conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void conv2d_few_kernel(const ProductConvParams& p, const PackWeightParams& w) {
  p.cout <= kFewChannels ? few_channels<Conv2dFew>(p, w) : few_inputs(p, w);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
