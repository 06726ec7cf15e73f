#include "common/product_conv_weight.h"
#include "ops/conv_transpose2d_algorithm.h"
#include "ops/conv_transpose2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

using Transpose = ConvTranspose2dTables<ConvTranspose4TransposeF2, ConvTranspose4TransposeF4, ConvTranspose3TransposeF2,
                                        ConvTranspose3TransposeF4>;

ConvAlgorithm conv_transpose2d_backward_input_algorithm_kernel(int64_t kernel, const ConvShape& s) {
  return Transpose::choose(kernel, s);
}

void conv_transpose2d_backward_input_kernel(int64_t kernel, ConvAlgorithm algorithm, const ProductConvParams& p) {
  Transpose::with(kernel, algorithm, [&]<class Alg>() { product_conv<Alg>(p); });
}

int64_t conv_transpose2d_backward_input_pack_kernel(int64_t kernel, ConvAlgorithm algorithm,
                                                    const PackWeightParams& p) {
  return Transpose::with(kernel, algorithm, [&]<class Alg>() { return product_conv_pack<Alg>(p); });
}

void conv_transpose2d_backward_weight_kernel(int64_t kernel, const ProductConvWeightParams& p) {
  kernel == 4 ? product_conv_weight<ConvTranspose4WeightF2>(p) : product_conv_weight<ConvTranspose3WeightF2>(p);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
