#include "common/few_channels.h"
#include "common/product_conv.h"
#include "ops/conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Where transforms in two dimensions would cost more than they save: few_inputs.h takes 0.6 of the time of F(4,3) from
// four channels to 320, from six 0.7 in planes and as long in channels_last; from eight to 32 0.6 in planes and 1.1 in
// channels_last, to more about as long; from twelve to eight, which fill half a vector, 0.4 in planes.
bool is_few_inputs(int64_t cin, int64_t cout) {
  return cin <= 6 || (cin <= 8 && cout > 8 && cout <= 32) || (cin <= 12 && cout <= kLanes<float> / 2);
}

}  // namespace

ConvAlgorithm conv2d_algorithm_kernel(const ConvShape& s) {
  if (s.cout <= kFewChannels) return ConvAlgorithm::direct;
  return is_few_inputs(s.cin, s.cout) ? ConvAlgorithm::rows : choose_tiles<WinogradF2, WinogradF4>(s);
}

void conv2d_kernel(ConvAlgorithm algorithm, const ProductConvParams& p) {
  with_tiles<WinogradF2, WinogradF4>(algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

int64_t conv2d_pack_kernel(ConvAlgorithm algorithm, const PackWeightParams& p) {
  return with_tiles<WinogradF2, WinogradF4>(algorithm, [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
