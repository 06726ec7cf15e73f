// sampler_step: one row of coefficients applied to the state of a diffusion sampler, with guidance, thresholding,
// noise, inpainting and the next model input; elementwise over tensors of any strides.
#pragma once
#include <cstdint>

#include "common/scalar.h"

namespace imagegen {

constexpr int kStepMaxDims = 8;  // the samples' axis included
constexpr int kStepMaxSlots = 8;

// The columns of a row before and after those of the slots c_h0 …; imagegen/ops/eager/sampler_step.py names them too.
enum StepColumnBefore : int { kTime, kScale, kAx, kAm, kCx, kC0, kCm, kCn, kStepColumnsBefore };
enum StepColumnAfter : int { kQx, kQ0, kQm, kSlot, kB0, kB1, kStepColumnsAfter };
constexpr int kStepColumns = int{kStepColumnsBefore} + int{kStepColumnsAfter};  // and one for each slot between them

// What a step reads and writes.
enum StepOperandName : int {
  kX,
  kModelOutput,
  kUncondOutput,
  kNoise,
  kSlots,                               // kStepMaxSlots of them
  kStepTerms = kSlots + kStepMaxSlots,  // x' and the stored tensor are sums of those above
  kMask = kStepTerms,
  kKnown,
  kKnownNoise,
  kNext,
  kStored,  // where one tensor takes what every sample stores; in place it is the sample's slot
  kModelInput,
  kStepOperands
};

// A tensor as [samples, size...] in the order in which a sample is walked through; neighbouring axes that can be one
// are.
struct StepOperand {
  void* data;  // null where there is none
  Dtype dtype;
  int dims;  // those of a sample, outermost first; at least 1
  int64_t sample_stride;
  int64_t size[kStepMaxDims - 1], stride[kStepMaxDims - 1];
};

struct SamplerStepParams {
  StepOperand operand[kStepOperands];
  int slots;
  int64_t samples, size;  // size: elements of a sample
  Dtype dtype;            // x's
  bool in_place;          // what a sample stores goes to its operand[kSlots + slot]

  const double* rows;                      // [samples or 1, columns]
  int64_t row_stride;                      // 0: one row for all
  const double* guidance;                  // [samples], or null: `scale` for all
  double scale, rescale, clip, threshold;  // clip: infinity for none; threshold: 0 for none

  bool seeded;
  uint64_t seed;
  uint32_t first, step;
  const int64_t* index;  // [samples or 1] steps, or null: `step` for all
  int64_t index_stride;

  int copies;
  bool streamed;  // outputs go past the caches

  // Of the passes before: deviations and magnitudes, written only where rescale or threshold asks for them.
  double* factor;    // [samples] on the guided output
  double* bound;     // [samples] s of the threshold
  double* partials;  // [samples, blocks, 4] mean and squared deviations of the conditional and the guided output
  void* magnitudes;  // [samples, size] |x_0|
};

// Where the rows are for the GPU, whose host does not read them: a launch never waits for the device.
struct StepRows {
  double value[kStepColumns + kStepMaxSlots];  // the one row, where the host has it
  const void* data;                            // else the rows, or the table, on the device
  bool is_double, by_sample;
  int64_t count, row_stride, column_stride;
  const int64_t* index;  // which row of the table; by_sample: one for each sample
  int64_t index_stride;
  uint32_t packed;  // bit i: operand i's elements lie side by side, four of them aligned
};

constexpr int64_t kStepBlock = 1024;  // elements at a time: a block of every term stays in L1

static constexpr int64_t step_blocks(int64_t size) {
  return (size + kStepBlock - 1) / kStepBlock;
}

}  // namespace imagegen

#ifdef TORCH_STABLE_ONLY  // the host's half: kernel files see no torch
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "ops/randn.h"

namespace imagegen {

// The operators' arguments but for the state, in the order of the schema.
struct SamplerStepArguments {
  const Tensor& model_output;
  const std::optional<Tensor>&uncond_output, &noise, &mask, &known, &known_noise;
  const Tensor& row;
  const std::optional<Tensor>&index, &guidance;
  double scale, rescale;
  std::optional<double> clip, threshold;
  std::optional<int64_t> seed;
  int64_t step, first, copies;
  ScalarType model_input_dtype;
};

// A tensor, or the part of `state` that stands for one.
struct StepView {
  void* data;
  ScalarType type;
  std::vector<int64_t> size, stride;

  int64_t numel() const { return std::accumulate(size.begin(), size.end(), int64_t{1}, std::multiplies<int64_t>()); }
  bool contiguous() const {
    int64_t dense = 1;
    for (size_t d = size.size(); d-- > 0; dense *= size[d])
      if (size[d] != 1 && stride[d] != dense) return false;
    return true;
  }
};

inline StepView step_view(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  return {const_cast<void*>(t.const_data_ptr()),
          t.scalar_type(),
          {size.begin(), size.end()},
          {stride.begin(), stride.end()}};
}

// state[i]
inline StepView step_view(const Tensor& state, int64_t i) {
  const auto size = state.sizes(), stride = state.strides();
  const int64_t offset = i * stride[0] * static_cast<int64_t>(state.element_size());
  return {static_cast<char*>(state.mutable_data_ptr()) + offset,
          state.scalar_type(),
          {size.begin() + 1, size.end()},
          {stride.begin() + 1, stride.end()}};
}

inline void check_step_operand(const char* name, const Tensor& t, const Tensor& on, const std::vector<int64_t>& shape) {
  IMAGEGEN_CHECK(t.device() == on.device(), "sampler_step: ", name, " must be on x's device ", device_string(on),
                 ", got ", device_string(t));
  check_dtype("sampler_step", name, t);
  IMAGEGEN_CHECK(shape_of(t) == shape, "sampler_step: ", name, " must have shape ", shape_string(shape), " to match x ",
                 shape_string(shape), ", got ", shape_string(t));
}

// Everything but what the numbers of a row say; on: the tensor whose device counts. Word for word imagegen/ops.
inline void check_sampler_step(const StepView& x, const Tensor& on, int64_t slots, const SamplerStepArguments& a) {
  check_dtype("sampler_step", "x", on);
  const int64_t dims = x.size.size();
  IMAGEGEN_CHECK(1 <= dims && dims <= kStepMaxDims, "sampler_step: x must have from 1 to 8 dimensions, got ", dims);
  check_step_operand("model_output", a.model_output, on, x.size);
  if (a.uncond_output) check_step_operand("uncond_output", *a.uncond_output, on, x.size);
  const int64_t samples = x.size[0];
  if (a.guidance) {
    IMAGEGEN_CHECK(a.guidance->device() == on.device(), "sampler_step: guidance must be on x's device ",
                   device_string(on), ", got ", device_string(*a.guidance));
    check_dtype("sampler_step", "guidance", *a.guidance);
    IMAGEGEN_CHECK(shape_of(*a.guidance) == std::vector<int64_t>{samples}, "sampler_step: guidance must have shape ",
                   shape_string({samples}), " to match x ", shape_string(x.size), ", got ", shape_string(*a.guidance));
  }
  IMAGEGEN_CHECK(0 <= a.rescale && a.rescale <= 1, "sampler_step: rescale must be from 0 to 1, got ", a.rescale);
  if (a.noise) check_step_operand("noise", *a.noise, on, x.size);
  if (a.mask) check_step_operand("mask", *a.mask, on, x.size);
  if (a.known) check_step_operand("known", *a.known, on, x.size);
  if (a.known_noise) check_step_operand("known_noise", *a.known_noise, on, x.size);
  IMAGEGEN_CHECK(a.mask.has_value() == a.known.has_value(),
                 "sampler_step: mask and known go together, only one was given");

  const std::vector<int64_t> row = shape_of(a.row);
  if (a.index) {
    IMAGEGEN_CHECK(a.index->device() == on.device(), "sampler_step: step must be on x's device ", device_string(on),
                   ", got ", device_string(*a.index));
    IMAGEGEN_CHECK(a.index->scalar_type() == ScalarType::Long &&
                       (a.index->dim() == 0 || shape_of(*a.index) == std::vector<int64_t>{samples}),
                   "sampler_step: step must be a number or an int64 tensor of shape () or (", samples, ",), got ",
                   dtype_string(a.index->scalar_type()), " ", shape_string(*a.index));
    IMAGEGEN_CHECK(row.size() == 2, "sampler_step: row must have shape (steps, n), got ", shape_string(row));
  } else {
    IMAGEGEN_CHECK(row.size() == 1 || (row.size() == 2 && row[0] == samples),
                   "sampler_step: row must have shape (n,) or (", samples, ", n), got ", shape_string(row));
  }
  IMAGEGEN_CHECK(a.row.scalar_type() == ScalarType::Float || a.row.scalar_type() == ScalarType::Double,
                 "sampler_step: row must be float32 or float64, got ", dtype_string(a.row.scalar_type()));
  IMAGEGEN_CHECK(row.back() == kStepColumns + slots && slots <= kStepMaxSlots, "sampler_step: row must have ",
                 kStepColumns, " columns and one for each of at most ", kStepMaxSlots, " slots, got ", row.back(),
                 " columns and ", slots, " slots");
  check_counter("sampler_step", a.step, a.first, samples);
  IMAGEGEN_CHECK(!a.clip || *a.clip > 0, "sampler_step: clip must be positive, got ", *a.clip);
  IMAGEGEN_CHECK(!a.threshold || (*a.threshold > 0 && *a.threshold <= 1),
                 "sampler_step: threshold must be in (0, 1], got ", *a.threshold);
  IMAGEGEN_CHECK(!a.threshold || !a.clip || *a.clip >= 1, "sampler_step: clip must be at least 1 with threshold, got ",
                 *a.clip);
  IMAGEGEN_CHECK(0 <= a.copies && a.copies <= 2, "sampler_step: copies must be 0, 1 or 2, got ", a.copies);
  const ScalarType t = a.model_input_dtype;
  IMAGEGEN_CHECK(
      t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double,
      "sampler_step: model_input_dtype must be float32, bfloat16, float16 or float64, got ", dtype_string(t));
}

// The slots of the functional form: of x's shape and dtype, or of no elements, which stands for none.
inline std::vector<StepView> step_slots(const std::vector<Tensor>& slots, const StepView& x, const Tensor& on) {
  std::vector<StepView> views;
  for (size_t k = 0; k < slots.size(); ++k) {
    StepView view = step_view(slots[k]);
    if (view.size == std::vector<int64_t>{0}) {
      view.data = nullptr;
    } else {
      const std::string name = "slots[" + std::to_string(k) + "]";
      check_same_device("sampler_step", name.c_str(), slots[k], on);
      check_same_dtype("sampler_step", name.c_str(), slots[k], on);
      check_shape("sampler_step", name.c_str(), slots[k], x.size, on);
    }
    views.push_back(std::move(view));
  }
  return views;
}

// Those of the form in place: state[1], state[2], …
inline std::vector<StepView> step_slots(const Tensor& state) {
  std::vector<StepView> views;
  for (int64_t k = 1; k < state.size(0); ++k) views.push_back(step_view(state, k));
  return views;
}

inline void check_step_state(const Tensor& state) {
  IMAGEGEN_CHECK(state.dim() >= 2 && state.size(0) > 0, "sampler_step_: state must be a tensor (1 + K, B, …), got ",
                 shape_string(state));
}

inline Dtype step_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: return Dtype::f32;
  }
}

// The axes of a sample in the order in which it is walked through, outermost first: that of its elements, which
// generated noise counts, or that of x in memory.
inline std::vector<int64_t> step_axes(const StepView& x, bool in_order_of_elements) {
  std::vector<int64_t> axes(x.size.size() - 1);
  std::iota(axes.begin(), axes.end(), 1);
  if (!in_order_of_elements)
    std::stable_sort(axes.begin(), axes.end(), [&](int64_t i, int64_t j) { return x.stride[i] > x.stride[j]; });
  return axes;
}

inline StepOperand step_operand(const StepView& t, const std::vector<int64_t>& axes) {
  StepOperand o{};
  o.data = t.data;
  o.dtype = step_dtype(t.type);
  o.sample_stride = t.stride[0];
  for (int64_t a : axes) {
    const int64_t n = t.size[a], s = t.stride[a];
    if (n == 1) continue;
    if (o.dims > 0 && o.stride[o.dims - 1] == n * s) {
      o.size[o.dims - 1] *= n;
      o.stride[o.dims - 1] = s;
    } else {
      o.size[o.dims] = n;
      o.stride[o.dims++] = s;
    }
  }
  if (o.dims == 0) o.size[o.dims] = 1, o.stride[o.dims++] = 1;
  return o;
}

// The next model input's memory format is x's where that is channels_last, else contiguous.
inline Tensor new_model_input(const StepView& x, const Tensor& on, int64_t copies, ScalarType type) {
  using torch::headeronly::MemoryFormat;
  std::vector<int64_t> size = x.size;
  size[0] *= copies;
  const bool last = size.size() == 4 && size[1] > 1 && x.stride[1] == 1 && !x.contiguous();
  return torch::stable::empty(size, type, std::nullopt, on.device(), std::nullopt,
                              last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// x', what is stored, the next model input.
inline std::vector<Tensor> new_step_outputs(const StepView& view, const Tensor& x, bool store,
                                            const SamplerStepArguments& a) {
  std::vector<Tensor> outputs{torch::stable::empty_like(x)};
  if (store) outputs.push_back(torch::stable::empty_like(x));
  if (a.copies) outputs.push_back(new_model_input(view, x, a.copies, a.model_input_dtype));
  return outputs;
}

// stored: null where what is stored goes to the slots themselves; its data is null where nothing is.
inline void set_step_operands(SamplerStepParams& p, const StepView& x, const std::vector<StepView>& slots,
                              const SamplerStepArguments& a, const std::vector<int64_t>& axes, const StepView& next,
                              const StepView* stored, const StepView* model_input) {
  const auto set = [&](int name, const StepView& view) { p.operand[name] = step_operand(view, axes); };
  const auto set_tensor = [&](int name, const std::optional<Tensor>& t) {
    if (t) set(name, step_view(*t));
  };
  set(kX, x);
  set(kModelOutput, step_view(a.model_output));
  set_tensor(kUncondOutput, a.uncond_output);
  set_tensor(kNoise, a.noise);
  set_tensor(kMask, a.mask);
  set_tensor(kKnown, a.known);
  set_tensor(kKnownNoise, a.known_noise);
  for (size_t k = 0; k < slots.size(); ++k)
    if (slots[k].data) set(kSlots + static_cast<int>(k), slots[k]);
  set(kNext, next);
  p.in_place = stored == nullptr;
  if (stored) set(kStored, *stored);
  if (model_input) set(kModelInput, *model_input);
}

// All but operands, rows and memory.
inline SamplerStepParams sampler_step_params(const StepView& x, int64_t slots, const SamplerStepArguments& a) {
  SamplerStepParams p{};
  p.slots = static_cast<int>(slots);
  p.samples = x.size[0];
  p.size = p.samples ? x.numel() / p.samples : 0;
  p.dtype = step_dtype(x.type);
  p.scale = a.uncond_output ? a.scale : 1.0;
  p.rescale = a.uncond_output ? a.rescale : 0.0;
  p.clip = a.clip ? *a.clip : std::numeric_limits<double>::infinity();
  p.threshold = a.threshold ? *a.threshold : 0.0;
  p.seeded = a.seed.has_value();
  p.seed = p.seeded ? static_cast<uint64_t>(*a.seed) : 0;
  p.first = static_cast<uint32_t>(a.first);
  p.step = static_cast<uint32_t>(a.step);
  p.copies = static_cast<int>(a.copies);
  return p;
}

}  // namespace imagegen
#endif
