#include "common/product_conv.h"
#include "common/product_conv_weight.h"
#include "ops/conv_transpose2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void conv_transpose2d_backward_input_kernel(int64_t kernel, const ProductConvParams& p) {
  kernel == 4 ? product_conv<ConvTranspose4TransposeF2>(p) : product_conv<ConvTranspose3TransposeF2>(p);
}

int64_t conv_transpose2d_backward_input_pack_kernel(int64_t kernel, const PackWeightParams& p) {
  return kernel == 4 ? product_conv_pack<ConvTranspose4TransposeF2>(p)
                     : product_conv_pack<ConvTranspose3TransposeF2>(p);
}

void conv_transpose2d_backward_weight_kernel(int64_t kernel, const ProductConvWeightParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    kernel == 4 ? ProductConvWeight<ConvTranspose4WeightF2, S>(p).run()
                : ProductConvWeight<ConvTranspose3WeightF2, S>(p).run();
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
