#include "ops/randn.h"

#include <torch/csrc/stable/library.h>

#include "common/cuda_stream.h"

namespace imagegen {

namespace cuda {
cudaError_t randn_kernel(const RandnParams&, cudaStream_t);
}

namespace {

void randn_cuda(const Tensor& out, int64_t seed, int64_t step, int64_t stream, int64_t first) {
  const CudaScope scope(out);
  const RandnParams params = randn_params(out, seed, step, stream, first);
  if (out.numel() == 0) return;
  check_launch("randn", cuda::randn_kernel(params, scope.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CUDA, m) {
  m.impl("randn", TORCH_BOX(&randn_cuda));
}

}  // namespace imagegen
