// The tables of conv_transpose2d's convolution or of its transpose: F(2,2) and F(4,2) for the 4x4 and the 3x3 kernel.
#pragma once
#include "common/product_conv.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <class FourF2, class FourF4, class ThreeF2, class ThreeF4>
struct ConvTranspose2dTables {
  static ConvAlgorithm choose(int64_t kernel, const ConvShape& s) {
    return kernel == 4 ? choose_tiles<FourF2, FourF4>(s) : choose_tiles<ThreeF2, ThreeF4>(s);
  }

  // Calls f.template operator()<Alg>().
  template <class F>
  static auto with(int64_t kernel, ConvAlgorithm algorithm, const F& f) {
    return kernel == 4 ? with_tiles<FourF2, FourF4>(algorithm, f) : with_tiles<ThreeF2, ThreeF4>(algorithm, f);
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
