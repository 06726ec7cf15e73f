#include "ops/bias_act.h"

#include <torch/csrc/stable/library.h>

#include "common/cuda_stream.h"

namespace imagegen {

namespace cuda {
cudaError_t bias_act_kernel(const BiasActParams&, cudaStream_t);
}

namespace {

Tensor run(const Tensor& x, const std::optional<Tensor>& b, const std::optional<Tensor>& grad, int64_t dim,
           const std::string& act, double alpha, double gain, std::optional<double> clamp) {
  const CudaScope scope(x);
  Tensor y = torch::stable::empty_like(x);
  const BiasActParams params = bias_act_params(x, b, grad, y, dim, act, alpha, gain, clamp);
  if (y.numel() == 0) return y;
  check_launch("bias_act", cuda::bias_act_kernel(params, scope.stream));
  return y;
}

Tensor bias_act_cuda(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, const std::string& act, double alpha,
                     double gain, std::optional<double> clamp) {
  return run(x, b, std::nullopt, dim, act, alpha, gain, clamp);
}

Tensor bias_act_backward_cuda(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& b, int64_t dim,
                              const std::string& act, double alpha, double gain, std::optional<double> clamp) {
  return run(x, b, grad, dim, act, alpha, gain, clamp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act_cuda));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward_cuda));
}

}  // namespace imagegen
