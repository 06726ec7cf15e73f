#include "common/product_conv.h"
#include "ops/upsample_conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void upsample_conv2d_kernel(const ProductConvParams& p) {
  product_conv<UpsampleForward>(p);
}

void upsample_conv2d_backward_input_kernel(const ProductConvParams& p) {
  product_conv<UpsampleTranspose>(p);
}

int64_t upsample_conv2d_pack_kernel(const PackWeightParams& p) {
  return product_conv_pack<UpsampleForward>(p);
}

int64_t upsample_conv2d_backward_input_pack_kernel(const PackWeightParams& p) {
  return product_conv_pack<UpsampleTranspose>(p);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
