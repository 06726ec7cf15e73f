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

// Where transforms would cost more than they save: directly from three channels takes 0.6 to 0.9 of the time of F(4,3),
// from four about as long to 128 channels and longer to more, from eight longer.
bool is_few_inputs(int64_t cin, int64_t cout) {
  return cin <= (cout <= 128 ? 4 : 3);
}

}  // namespace

ConvAlgorithm conv2d_algorithm_kernel(const ConvShape& s) {
  const bool few = s.cout <= kFewChannels || is_few_inputs(s.cin, s.cout);
  return few ? ConvAlgorithm::direct : choose_tiles<WinogradF2, WinogradF4>(s);
}

void conv2d_kernel(ConvAlgorithm algorithm, const ProductConvParams& p) {
  with_algorithm(algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

int64_t conv2d_pack_kernel(ConvAlgorithm algorithm, const PackWeightParams& p) {
  return with_algorithm(algorithm, [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
