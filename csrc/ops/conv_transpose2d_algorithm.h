// How conv_transpose2d multiplies, and the choice.
#pragma once

namespace imagegen {

enum class ConvTranspose2dAlgorithm : int { direct, f2, f4 };  // f2 and f4: minimal filtering F(2,2) and F(4,2)

}  // namespace imagegen

#ifdef IMAGEGEN_CAPABILITY
#include "common/product_conv.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// The tables of the convolution, or those of its transpose: F(2,2) and F(4,2) for the 4x4 and for the 3x3 kernel.
template <class FourF2, class FourF4, class ThreeF2, class ThreeF4>
struct ConvTranspose2dTables {
  // F(4,2) where its larger tiles waste little, but not for bf16 dot products, in which its data would err too much.
  static ConvTranspose2dAlgorithm choose(int64_t kernel, const ProductConvParams& p) {
    bool bf16_dots = false;
    dispatch_dtype(p.dtype, [&]<class S>() { dispatch_dot<S>(p.cin, [&]<class E>() { bf16_dots = E::kPair == 2; }); });
    const bool f4_costs_less = kernel == 4 ? cost<FourF4>(p) < cost<FourF2>(p) : cost<ThreeF4>(p) < cost<ThreeF2>(p);
    return !bf16_dots && f4_costs_less ? ConvTranspose2dAlgorithm::f4 : ConvTranspose2dAlgorithm::f2;
  }

  // Calls f.template operator()<Alg>().
  template <class F>
  static auto with(int64_t kernel, ConvTranspose2dAlgorithm algorithm, const F& f) {
    if (algorithm == ConvTranspose2dAlgorithm::f4)
      return kernel == 4 ? f.template operator()<FourF4>() : f.template operator()<ThreeF4>();
    return kernel == 4 ? f.template operator()<FourF2>() : f.template operator()<ThreeF2>();
  }

 private:
  // Multiplications a pair of channels takes. Reading a weight from memory costs as much as multiplying by it for
  // eight tiles, which counts where there are few: a generator's first layers have them in its batch alone.
  template <class Alg>
  static int64_t cost(const ProductConvParams& p) {
    constexpr int64_t kReading = 8;
    const int64_t tiles = p.batch * ceil_div(p.out_h, Alg::kOut) * ceil_div(p.out_w, Alg::kOut);
    return Alg::kProducts * Alg::kProducts * (tiles + kReading);
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
