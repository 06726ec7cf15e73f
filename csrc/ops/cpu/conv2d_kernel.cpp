#include "common/few_channels.h"
#include "common/product_conv.h"
#include "ops/conv2d_algorithm.h"
#include "ops/conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Multiplications that a pair of channels takes in one image: of a batch it is the same image. Reading a weight from
// memory costs as much as multiplying by it for eight tiles, which counts where there are few.
template <class Alg>
int64_t cost(const ProductConvParams& p) {
  constexpr int64_t kReading = 8;
  const int64_t tiles = ceil_div(p.out_h, Alg::kOut) * ceil_div(p.out_w, Alg::kOut);
  return Alg::kProducts * Alg::kProducts * (tiles + kReading);
}

template <class F>
INLINE auto with_algorithm(Conv2dAlgorithm algorithm, const F& f) {
  return algorithm == Conv2dAlgorithm::winograd_f4 ? f.template operator()<WinogradF4>()
                                                   : f.template operator()<WinogradF2>();
}

}  // namespace

// F(4,3), or F(2,3) where its smaller tiles waste less of a small image, and for bf16 dot products: rounded to bf16,
// the data of F(4,3) would err six times as much. Up to four output channels directly.
Conv2dAlgorithm conv2d_algorithm_kernel(const ProductConvParams& p) {
  if (p.cout <= kFewChannels) return Conv2dAlgorithm::direct;
  bool bf16_dots = false;
  dispatch_dtype(p.dtype, [&]<class S>() { dispatch_dot<S>(p.cin, [&]<class E>() { bf16_dots = E::kPair == 2; }); });
  return bf16_dots || cost<WinogradF2>(p) <= cost<WinogradF4>(p) ? Conv2dAlgorithm::winograd_f2
                                                                 : Conv2dAlgorithm::winograd_f4;
}

void conv2d_kernel(Conv2dAlgorithm algorithm, const ProductConvParams& p) {
  with_algorithm(algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

int64_t conv2d_pack_kernel(Conv2dAlgorithm algorithm, const PackWeightParams& p) {
  return with_algorithm(algorithm, [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

void conv2d_few_kernel(const ProductConvParams& p, const PackWeightParams& w) {
  few_channels<Conv2dFew>(p, w);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
