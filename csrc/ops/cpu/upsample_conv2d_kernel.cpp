#include "common/product_conv.h"
#include "ops/upsample_conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {

namespace {

template <class Alg>
void convolve(const ProductConvParams& p) {
  dispatch_dtype(p.dtype,
                 [&]<class S>() { dispatch_dot<S>(p.cin, [&]<class E>() { ProductConv<Alg, E, S>(p).run(); }); });
}

template <class Alg>
int64_t pack(const PackWeightParams& p) {
  int64_t bytes = 0;
  dispatch_dtype(p.dtype, [&]<class S>() {
    dispatch_dot<S>(p.cin, [&]<class E>() {
      if (p.u) pack_weight<Alg, E, S>(p);
      bytes = ProductConv<Alg, E, S>::packed_elements(p.cin, p.cout) * int64_t{sizeof(typename E::T)};
    });
  });
  return bytes;
}

}  // namespace

void upsample_conv2d_kernel(const ProductConvParams& p) {
  convolve<UpsampleForward>(p);
}

void upsample_conv2d_backward_input_kernel(const ProductConvParams& p) {
  convolve<UpsampleTranspose>(p);
}

int64_t upsample_conv2d_pack_kernel(const PackWeightParams& p) {
  return pack<UpsampleForward>(p);
}

int64_t upsample_conv2d_backward_input_pack_kernel(const PackWeightParams& p) {
  return pack<UpsampleTranspose>(p);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
