#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/memory.h"
#include "common/output_cache.h"
#include "ops/sampler_step_host.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void sampler_step_kernel(const SamplerStepParams&))

namespace {

// Outputs above this, with what is read for them, leave the caches before anybody reads them again.
constexpr int64_t kStreamedBytes = int64_t{24} << 20;

template <class S>
double read(const Tensor& t, int64_t offset) {
  return static_cast<double>(static_cast<const S*>(t.const_data_ptr())[offset]);
}

double number(const Tensor& t, int64_t offset) {
  return t.scalar_type() == ScalarType::Double ? read<double>(t, offset) : read<float>(t, offset);
}

// The rows of all samples, or the one they share.
std::vector<double> read_rows(const Tensor& row, const std::optional<Tensor>& index, int64_t samples) {
  const int64_t dims = row.dim(), columns = row.size(dims - 1), stride = row.stride(dims - 1);
  const bool shared = index ? index->dim() == 0 : dims == 1;
  std::vector<double> rows;
  rows.reserve(columns * (shared ? 1 : samples));
  for (int64_t b = 0; b < (shared ? 1 : samples); ++b) {
    int64_t i = b;
    if (index) {
      i = static_cast<const int64_t*>(index->const_data_ptr())[shared ? 0 : b * index->stride(0)];
      IMAGEGEN_CHECK(0 <= i && i < row.size(0), "sampler_step: step must be a row of the table, from 0 to ",
                     row.size(0) - 1, ", got ", i);
    }
    const int64_t first = dims == 1 ? 0 : i * row.stride(0);
    for (int64_t c = 0; c < columns; ++c) rows.push_back(number(row, first + c * stride));
  }
  return rows;
}

std::vector<double> read_guidance(const Tensor& guidance) {
  const Tensor g = torch::stable::to(guidance, ScalarType::Double);
  std::vector<double> values(g.size(0));
  for (size_t b = 0; b < values.size(); ++b) values[b] = read<double>(g, b * g.stride(0));
  return values;
}

// What a row reads has to be there.
void check_row(const SamplerStepParams& p, const double* row) {
  const double *after = row + kStepColumnsBefore + p.slots, slot = after[kSlot];
  IMAGEGEN_CHECK(slot >= -1 && slot < p.slots && slot == std::floor(slot),
                 "sampler_step: the row's slot must be from -1 to ", p.slots - 1, ", got ", slot);
  const auto check = [](bool there, const std::string& name) {
    IMAGEGEN_CHECK(there, "sampler_step: the row reads ", name, ", but it was not given");
  };
  check(row[kCn] == 0 || p.operand[kNoise].data || p.seeded, "noise");
  for (int k = 0; k < p.slots; ++k)
    check(row[kStepColumnsBefore + k] == 0 || p.operand[kSlots + k].data, "slots[" + std::to_string(k) + "]");
  check(after[kB1] == 0 || !p.operand[kMask].data || p.operand[kKnownNoise].data || p.seeded, "known_noise");
}

bool bounds_any(const SamplerStepParams& p, const std::vector<double>& rows, size_t columns) {
  for (size_t r = 0; r < rows.size(); r += columns)
    if (rows[r + kC0] != 0 || rows[r + kStepColumnsBefore + p.slots + kQ0] != 0) return true;
  return false;
}

struct Cpu {
  static Tensor made(const Tensor& t) { return in_kept_memory(t); }

  static void run(const StepView& x, const Tensor&, const std::vector<StepView>& slots, const SamplerStepArguments& a,
                  const StepOutputs& to) {
    SamplerStepParams p = sampler_step_params(x, slots.size(), a);
    if (p.samples * p.size == 0) return;

    const std::vector<double> rows = read_rows(a.row, a.index, p.samples);
    const size_t columns = kStepColumns + p.slots;
    p.rows = rows.data();
    p.row_stride = rows.size() == columns ? 0 : columns;
    p.index = a.index ? static_cast<const int64_t*>(a.index->const_data_ptr()) : nullptr;
    p.index_stride = a.index && a.index->dim() ? a.index->stride(0) : 0;

    const bool generates = p.seeded && (!a.noise || (a.mask && !a.known_noise));
    set_step_operands(p, x, slots, a, step_axes(x, generates), to);
    int64_t bytes = 0;
    bool any_double = false;
    for (const StepOperand& o : p.operand) {
      if (o.data) bytes += p.samples * p.size * (o.dtype == Dtype::f64 ? 8 : o.dtype == Dtype::f32 ? 4 : 2);
      any_double |= o.data && o.dtype == Dtype::f64;
    }
    for (size_t r = 0; r < rows.size(); r += columns) check_row(p, rows.data() + r);
    p.streamed = bytes > kStreamedBytes;

    std::vector<double> guidance, factor, bound, partials;
    if (a.guidance) guidance = read_guidance(*a.guidance), p.guidance = guidance.data();
    if (p.rescale != 0) {
      factor.resize(p.samples), p.factor = factor.data();
      partials.resize(p.samples * step_blocks(p.size) * 4), p.partials = partials.data();
    }
    const size_t magnitudes =
        p.threshold != 0 && bounds_any(p, rows, columns) ? p.samples * p.size * (p.dtype == Dtype::f64 ? 8 : 4) : 0;
    if (magnitudes) {
      bound.resize(p.samples), p.bound = bound.data();
      p.magnitudes = allocate(magnitudes);
    }
    const Dtype widest = any_double ? Dtype::f64 : Dtype::f32;
    IMAGEGEN_PICK_KERNEL(sampler_step_kernel, widest)(p);
    if (magnitudes) release(p.magnitudes, magnitudes);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("sampler_step", TORCH_BOX(&SamplerStepOperators<Cpu>::functional));
  m.impl("sampler_step_", TORCH_BOX(&SamplerStepOperators<Cpu>::in_place));
}

}  // namespace imagegen
