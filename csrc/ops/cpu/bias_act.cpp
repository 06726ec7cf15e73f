#include "ops/bias_act.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/output_cache.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void bias_act_kernel(const BiasActParams&))

namespace {

Tensor run(const Tensor& x, const std::optional<Tensor>& b, const std::optional<Tensor>& grad, int64_t dim,
           const std::string& act, double alpha, double gain, std::optional<double> clamp) {
  Tensor y = in_kept_memory(torch::stable::empty_like(x));
  const BiasActParams params = bias_act_params(x, b, grad, y, dim, act, alpha, gain, clamp);
  if (y.numel() == 0) return y;
  IMAGEGEN_PICK_KERNEL(bias_act_kernel, params.dtype)(params);
  return y;
}

Tensor bias_act_cpu(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, const std::string& act, double alpha,
                    double gain, std::optional<double> clamp) {
  return run(x, b, std::nullopt, dim, act, alpha, gain, clamp);
}

Tensor bias_act_backward_cpu(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& b, int64_t dim,
                             const std::string& act, double alpha, double gain, std::optional<double> clamp) {
  return run(x, b, grad, dim, act, alpha, gain, clamp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act_cpu));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward_cpu));
}

}  // namespace imagegen
