#include <torch/csrc/stable/library.h>

#include "common/cuda_stream.h"
#include "ops/sampler_step_host.h"

namespace imagegen {

namespace cuda {
cudaError_t sampler_step_kernel(const SamplerStepParams&, const StepRows&, cudaStream_t);
}

namespace {

StepRows step_rows(const Tensor& row, const std::optional<Tensor>& index, const Tensor& on) {
  StepRows rows{};
  const int64_t dims = row.dim(), columns = row.size(dims - 1);
  rows.is_double = row.scalar_type() == ScalarType::Double;
  rows.column_stride = row.stride(dims - 1);
  if (dims == 1 && row.is_cpu()) {
    for (int64_t c = 0; c < columns; ++c)
      rows.value[c] = rows.is_double ? static_cast<const double*>(row.const_data_ptr())[c * rows.column_stride]
                                     : static_cast<const float*>(row.const_data_ptr())[c * rows.column_stride];
    return rows;
  }
  check_same_device("sampler_step", "row", row, on);
  rows.data = row.const_data_ptr();
  rows.count = dims == 1 ? 1 : row.size(0);
  rows.row_stride = dims == 1 ? 0 : row.stride(0);
  rows.by_sample = index ? index->dim() == 1 : dims == 2;
  if (index) {
    rows.index = static_cast<const int64_t*>(index->const_data_ptr());
    rows.index_stride = index->dim() == 1 ? index->stride(0) : 0;
  }
  return rows;
}

// Four elements at a time: they lie side by side, and every sample begins at an address fit for such a load.
bool is_packed(const StepOperand& o, int64_t size) {
  const int64_t bytes = o.dtype == Dtype::f64 ? 16 : o.dtype == Dtype::f32 ? 16 : 8;
  return o.data && o.dims == 1 && (o.stride[0] == 1 || size == 1) && o.sample_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(o.data) % bytes == 0;
}

struct Cuda {
  static Tensor made(const Tensor& t) { return t; }

  static void run(const StepView& x, const Tensor& on, const std::vector<StepView>& slots,
                  const SamplerStepArguments& a, const StepOutputs& to) {
    const CudaScope scope(on);
    SamplerStepParams p = sampler_step_params(x, slots.size(), a);
    StepRows rows = step_rows(a.row, a.index, on);
    if (p.samples * p.size == 0) return;

    const bool generates = p.seeded && (!a.noise || (a.mask && !a.known_noise));
    set_step_operands(p, x, slots, a, step_axes(x, generates), to);
    for (int i = 0; i < kStepOperands; ++i)
      if (is_packed(p.operand[i], p.size)) rows.packed |= 1u << i;

    std::vector<Tensor> kept;  // until the launch
    const auto doubles = [&](std::vector<int64_t> size) {
      kept.push_back(torch::stable::empty(size, ScalarType::Double, std::nullopt, on.device()));
      return static_cast<double*>(kept.back().mutable_data_ptr());
    };
    if (a.guidance) {
      kept.push_back(torch::stable::contiguous(torch::stable::to(*a.guidance, ScalarType::Double)));
      p.guidance = static_cast<const double*>(kept.back().const_data_ptr());
    }
    if (p.rescale != 0) p.factor = doubles({p.samples});
    if (p.threshold != 0) p.bound = doubles({p.samples});
    check_launch("sampler_step", cuda::sampler_step_kernel(p, rows, scope.stream));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CUDA, m) {
  m.impl("sampler_step", TORCH_BOX(&SamplerStepOperators<Cuda>::functional));
  m.impl("sampler_step_", TORCH_BOX(&SamplerStepOperators<Cuda>::in_place));
}

}  // namespace imagegen
