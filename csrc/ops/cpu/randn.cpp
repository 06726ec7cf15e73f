#include "ops/randn.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/memory.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void randn_kernel(const RandnParams&))

namespace {

void randn_cpu(const Tensor& out, int64_t seed, int64_t step, int64_t stream, int64_t first) {
  const RandnParams params = randn_params(out, seed, step, stream, first);
  if (out.numel() == 0) return;
  advise_huge(params.out, out.numel() * out.element_size());
  IMAGEGEN_PICK_KERNEL(randn_kernel, params.dtype)(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("randn", TORCH_BOX(&randn_cpu));
}

}  // namespace imagegen
