#include "common/product_conv.h"
#include "ops/upsample_conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

void upsample_conv2d_kernel(const ProductConvParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() { ProductConv<UpsampleForward, S>(p).run(); });
}

void upsample_conv2d_backward_input_kernel(const ProductConvParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() { ProductConv<UpsampleTranspose, S>(p).run(); });
}

void upsample_conv2d_pack_kernel(const PackWeightParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() { pack_weight<UpsampleForward, S>(p); });
}

void upsample_conv2d_backward_input_pack_kernel(const PackWeightParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() { pack_weight<UpsampleTranspose, S>(p); });
}

void upsample_conv2d_packed_bytes_kernel(Dtype dtype, int64_t cin, int64_t cout, int64_t* forward, int64_t* transpose) {
  dispatch_dtype(dtype, [&]<class S>() {
    using T = typename DotOf<S>::type::T;
    *forward = ProductConv<UpsampleForward, S>::packed_elements(cin, cout) * int64_t{sizeof(T)};
    *transpose = ProductConv<UpsampleTranspose, S>::packed_elements(cout, cin) * int64_t{sizeof(T)};
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
