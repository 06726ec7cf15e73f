#include "common/few_channels.h"
#include "ops/conv_transpose2d_algorithm.h"
#include "ops/conv_transpose2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

using Forward = ConvTranspose2dTables<ConvTranspose4ForwardF2, ConvTranspose4ForwardF4, ConvTranspose3ForwardF2,
                                      ConvTranspose3ForwardF4>;

ConvAlgorithm conv_transpose2d_algorithm_kernel(int64_t kernel, const ConvShape& s) {
  return s.cout <= kFewChannels ? ConvAlgorithm::direct : Forward::choose(kernel, s);
}

void conv_transpose2d_kernel(int64_t kernel, ConvAlgorithm algorithm, const ProductConvParams& p) {
  Forward::with(kernel, algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

int64_t conv_transpose2d_pack_kernel(int64_t kernel, ConvAlgorithm algorithm, const PackWeightParams& p) {
  return Forward::with(kernel, algorithm, [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

void conv_transpose2d_few_kernel(int64_t kernel, const ProductConvParams& p, const PackWeightParams& w) {
  kernel == 4 ? few_channels<ConvTranspose4Few>(p, w) : few_channels<ConvTranspose3Few>(p, w);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
