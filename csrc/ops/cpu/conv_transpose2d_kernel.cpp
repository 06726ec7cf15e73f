#include "common/few_channels.h"
#include "common/product_conv.h"
#include "ops/conv_transpose2d_algorithm.h"
#include "ops/conv_transpose2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Calls f.template operator()<Alg>() with the tables for a kernel and an algorithm.
template <class F>
INLINE auto with_tables(int64_t kernel, ConvTranspose2dAlgorithm algorithm, const F& f) {
  if (kernel == 3) return f.template operator()<ConvTranspose3ForwardF2>();
  return algorithm == ConvTranspose2dAlgorithm::f4 ? f.template operator()<ConvTranspose4ForwardF4>()
                                                   : f.template operator()<ConvTranspose4ForwardF2>();
}

// Multiplications a pair of channels takes. Reading a weight from memory costs as much as multiplying by it for eight
// tiles, which counts where there are few.
template <class Alg>
int64_t cost(const ProductConvParams& p) {
  constexpr int64_t kReading = 8;
  const int64_t tiles = p.batch * ceil_div(p.out_h, Alg::kOut) * ceil_div(p.out_w, Alg::kOut);
  return Alg::kProducts * Alg::kProducts * (tiles + kReading);
}

}  // namespace

// Up to four output channels directly. F(2,2) for bf16 dot products, in which the data of F(4,2) would err too much.
ConvTranspose2dAlgorithm conv_transpose2d_algorithm_kernel(int64_t kernel, const ProductConvParams& p) {
  if (p.cout <= kFewChannels) return ConvTranspose2dAlgorithm::direct;
  bool bf16_dots = false;
  dispatch_dtype(p.dtype, [&]<class S>() { dispatch_dot<S>(p.cin, [&]<class E>() { bf16_dots = E::kPair == 2; }); });
  const bool f2 = bf16_dots || kernel == 3 || cost<ConvTranspose4ForwardF2>(p) <= cost<ConvTranspose4ForwardF4>(p);
  return f2 ? ConvTranspose2dAlgorithm::f2 : ConvTranspose2dAlgorithm::f4;
}

void conv_transpose2d_kernel(int64_t kernel, ConvTranspose2dAlgorithm algorithm, const ProductConvParams& p) {
  with_tables(kernel, algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

int64_t conv_transpose2d_pack_kernel(int64_t kernel, ConvTranspose2dAlgorithm algorithm, const PackWeightParams& p) {
  return with_tables(kernel, algorithm, [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

void conv_transpose2d_few_kernel(int64_t kernel, const ProductConvParams& p, const PackWeightParams& w) {
  kernel == 4 ? few_channels<ConvTranspose4Few>(p, w) : few_channels<ConvTranspose3Few>(p, w);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
