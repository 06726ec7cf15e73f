#include "common/few_channels.h"
#include "common/product_conv.h"
#include "ops/upsample_conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

ConvAlgorithm upsample_conv2d_algorithm_kernel(const ConvShape& s) {
  return s.cout <= kFewChannels ? ConvAlgorithm::direct : choose_tiles<UpsampleForward2, UpsampleForward4>(s);
}

void upsample_conv2d_kernel(ConvAlgorithm algorithm, const ProductConvParams& p) {
  with_tiles<UpsampleForward2, UpsampleForward4>(algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

void upsample_conv2d_backward_input_kernel(const ProductConvParams& p) {
  product_conv<UpsampleTranspose>(p);
}

int64_t upsample_conv2d_pack_kernel(ConvAlgorithm algorithm, const PackWeightParams& p) {
  return with_tiles<UpsampleForward2, UpsampleForward4>(algorithm,
                                                        [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

int64_t upsample_conv2d_backward_input_pack_kernel(const PackWeightParams& p) {
  return product_conv_pack<UpsampleTranspose>(p);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
