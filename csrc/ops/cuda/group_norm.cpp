#include "ops/group_norm.h"

#include <torch/csrc/stable/library.h>

#include "common/cuda_stream.h"
#include "ops/group_norm_host.h"

namespace imagegen {

namespace cuda {
int64_t group_norm_workspace_bytes(const GroupNormParams&);
cudaError_t group_norm_kernel(const GroupNormParams&, void* workspace, cudaStream_t);
}  // namespace cuda

namespace {

struct Cuda {
  static Tensor empty(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype,
                      torch::headeronly::MemoryFormat format) {
    return torch::stable::empty(shape, dtype, std::nullopt, x.device(), std::nullopt, format);
  }

  static void run(const GroupNormParams& params, const Tensor& x) {
    const CudaScope scope(x);
    Tensor workspace =
        torch::stable::empty({cuda::group_norm_workspace_bytes(params)}, ScalarType::Byte, std::nullopt, x.device());
    check_launch("group_norm", cuda::group_norm_kernel(params, workspace.mutable_data_ptr(), scope.stream));
  }
};

using Operators = GroupNormOperators<Cuda>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CUDA, m) {
  m.impl("group_norm", TORCH_BOX(&Operators::forward));
  m.impl("group_norm_with_moments", TORCH_BOX(&Operators::with_moments));
  m.impl("group_norm_factors", TORCH_BOX(&Operators::factors));
  m.impl("group_norm_backward", TORCH_BOX(&Operators::backward));
}

}  // namespace imagegen
