#include "ops/group_norm.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/output_cache.h"
#include "ops/group_norm_host.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void group_norm_planar_kernel(const GroupNormParams&))
IMAGEGEN_DECLARE_KERNEL(void group_norm_innermost_kernel(const GroupNormParams&))

namespace {

using Format = torch::headeronly::MemoryFormat;

struct Cpu {
  static Tensor empty(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype, Format format) {
    return new_output(x, shape, dtype, format == Format::ChannelsLast);
  }

  static void run(const GroupNormParams& params, const Tensor&) {
    params.channels_innermost ? IMAGEGEN_PICK_KERNEL(group_norm_innermost_kernel, params.dtype)(params)
                              : IMAGEGEN_PICK_KERNEL(group_norm_planar_kernel, params.dtype)(params);
  }
};

using Operators = GroupNormOperators<Cpu>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&Operators::forward));
  m.impl("group_norm_with_moments", TORCH_BOX(&Operators::with_moments));
  m.impl("group_norm_factors", TORCH_BOX(&Operators::factors));
  m.impl("group_norm_backward", TORCH_BOX(&Operators::backward));
}

}  // namespace imagegen
