// What the CUDA kernel of conv_transpose2d is told; no torch, for .cu files.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/scalar.h"

namespace imagegen {

struct ConvTranspose2dParams {
  const void* x;  // (batch, cin, height, width)
  int64_t x_stride[4];
  const void* weight;                     // [cin][kernel][kernel][cout]
  const void *bias, *scale, *shift;       // (cout), each null or there
  Dtype dtype, scale_dtype, shift_dtype;  // of everything else, and of these, which may be float
  bool allow_tf32;                        // of float: one product of tf32 in place of three
  void* y;                                // (batch, cout, out_h, out_w)
  int64_t y_stride[4];
  int64_t batch, cin, cout, height, width, out_h, out_w;
  int kernel;
  Activation activation;
};

}  // namespace imagegen
