#include "common/few_channels.h"
#include "common/product_conv.h"
#include "ops/conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <class F>
INLINE auto with_algorithm(ConvAlgorithm algorithm, const F& f) {
  return algorithm == ConvAlgorithm::large_tiles ? f.template operator()<WinogradF4>()
                                                 : f.template operator()<WinogradF2>();
}

}  // namespace

ConvAlgorithm conv2d_algorithm_kernel(const ConvShape& s) {
  return s.cout <= kFewChannels ? ConvAlgorithm::direct : choose_tiles<WinogradF2, WinogradF4>(s);
}

void conv2d_kernel(ConvAlgorithm algorithm, const ProductConvParams& p) {
  with_algorithm(algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

int64_t conv2d_pack_kernel(ConvAlgorithm algorithm, const PackWeightParams& p) {
  return with_algorithm(algorithm, [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

void conv2d_few_kernel(const ProductConvParams& p, const PackWeightParams& w) {
  few_channels<Conv2dFew>(p, w);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
