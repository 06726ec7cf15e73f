// sampler_step's operators, but for the step itself: arguments, their checks, views of them, outputs; shared by CPU and
// CUDA.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "ops/randn.h"
#include "ops/sampler_step.h"

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

// A tensor, or the part of one that a step works on; without memory of its own, which took as long as a small step.
struct StepView {
  void* data;
  ScalarType type;
  int64_t dims, size[kStepMaxDims], stride[kStepMaxDims];

  int64_t numel() const { return std::accumulate(size, size + dims, int64_t{1}, std::multiplies<int64_t>()); }
  std::vector<int64_t> shape() const { return {size, size + dims}; }
  bool is_contiguous() const {
    int64_t dense = 1;
    for (int64_t d = dims; d-- > 0; dense *= size[d])
      if (size[d] != 1 && stride[d] != dense) return false;
    return true;
  }
  bool is_channels_last() const { return dims == 4 && size[1] > 1 && stride[1] == 1 && !is_contiguous(); }
  bool has_shape_of(const Tensor& t) const {
    return t.dim() == dims && std::equal(size, size + dims, t.sizes().data());
  }
};

// t, or t[i]; of at most kStepMaxDims axes.
inline StepView step_view(const Tensor& t) {
  StepView view{const_cast<void*>(t.const_data_ptr()), t.scalar_type(), t.dim(), {}, {}};
  std::copy_n(t.sizes().data(), view.dims, view.size);
  std::copy_n(t.strides().data(), view.dims, view.stride);
  return view;
}
inline StepView step_view(const Tensor& t, int64_t i) {
  const auto size = t.sizes(), stride = t.strides();
  const int64_t offset = i * stride[0] * static_cast<int64_t>(t.element_size());
  StepView view{static_cast<char*>(t.mutable_data_ptr()) + offset, t.scalar_type(), t.dim() - 1, {}, {}};
  std::copy_n(size.data() + 1, view.dims, view.size);
  std::copy_n(stride.data() + 1, view.dims, view.stride);
  return view;
}

inline void check_step_dims(int64_t dims) {
  IMAGEGEN_CHECK(1 <= dims && dims <= kStepMaxDims, "sampler_step: x must have from 1 to 8 dimensions, got ", dims);
}

inline void check_step_operand(const char* name, const Tensor& t, const Tensor& on, const StepView& x) {
  check_same_device("sampler_step", name, t, on);
  check_dtype("sampler_step", name, t);
  IMAGEGEN_CHECK(x.has_shape_of(t), "sampler_step: ", name, " must have shape ", shape_string(x.shape()),
                 " to match x ", shape_string(x.shape()), ", got ", shape_string(t));
}

// Everything but what the numbers of a row say; on: the tensor whose device counts. Word for word imagegen/ops.
inline void check_sampler_step(const StepView& x, const Tensor& on, int64_t slots, const SamplerStepArguments& a) {
  check_dtype("sampler_step", "x", on);
  check_step_operand("model_output", a.model_output, on, x);
  if (a.uncond_output) check_step_operand("uncond_output", *a.uncond_output, on, x);
  const int64_t samples = x.size[0];
  if (a.guidance) {
    check_same_device("sampler_step", "guidance", *a.guidance, on);
    check_dtype("sampler_step", "guidance", *a.guidance);
    IMAGEGEN_CHECK(shape_of(*a.guidance) == std::vector<int64_t>{samples}, "sampler_step: guidance must have shape ",
                   shape_string({samples}), " to match x ", shape_string(x.shape()), ", got ",
                   shape_string(*a.guidance));
  }
  IMAGEGEN_CHECK(0 <= a.rescale && a.rescale <= 1, "sampler_step: rescale must be from 0 to 1, got ", a.rescale);
  if (a.noise) check_step_operand("noise", *a.noise, on, x);
  if (a.mask) check_step_operand("mask", *a.mask, on, x);
  if (a.known) check_step_operand("known", *a.known, on, x);
  if (a.known_noise) check_step_operand("known_noise", *a.known_noise, on, x);
  IMAGEGEN_CHECK(a.mask.has_value() == a.known.has_value(),
                 "sampler_step: mask and known go together, only one was given");

  const auto row = a.row.sizes();
  if (a.index) {
    check_same_device("sampler_step", "step", *a.index, on);
    IMAGEGEN_CHECK(a.index->scalar_type() == ScalarType::Long &&
                       (a.index->dim() == 0 || shape_of(*a.index) == std::vector<int64_t>{samples}),
                   "sampler_step: step must be a number or an int64 tensor of shape () or (", samples, ",), got ",
                   dtype_string(a.index->scalar_type()), " ", shape_string(*a.index));
    IMAGEGEN_CHECK(row.size() == 2, "sampler_step: row must have shape (steps, n), got ", shape_string(a.row));
  } else {
    IMAGEGEN_CHECK(row.size() == 1 || (row.size() == 2 && row[0] == samples),
                   "sampler_step: row must have shape (n,) or (", samples, ", n), got ", shape_string(a.row));
  }
  IMAGEGEN_CHECK(a.row.scalar_type() == ScalarType::Float || a.row.scalar_type() == ScalarType::Double,
                 "sampler_step: row must be float32 or float64, got ", dtype_string(a.row.scalar_type()));
  const int64_t columns = row[row.size() - 1];
  IMAGEGEN_CHECK(columns == kStepColumns + slots && slots <= kStepMaxSlots, "sampler_step: row must have ",
                 kStepColumns, " columns and one for each of at most ", kStepMaxSlots, " slots, got ", columns,
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
  views.reserve(slots.size());
  for (size_t k = 0; k < slots.size(); ++k) {
    const Tensor& h = slots[k];
    if (h.dim() == 1 && h.size(0) == 0) {
      views.push_back({});
      continue;
    }
    const std::string name = "slots[" + std::to_string(k) + "]";
    check_step_operand(name.c_str(), h, on, x);
    check_same_dtype("sampler_step", name.c_str(), h, on);
    views.push_back(step_view(h));
  }
  return views;
}

// Those of the form in place: state[1], state[2], …
inline std::vector<StepView> step_slots(const Tensor& state) {
  std::vector<StepView> views;
  views.reserve(state.size(0));
  for (int64_t k = 1; k < state.size(0); ++k) views.push_back(step_view(state, k));
  return views;
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
struct StepAxes {
  int count;
  int axis[kStepMaxDims];
};
inline StepAxes step_axes(const StepView& x, bool in_order_of_elements) {
  StepAxes axes{static_cast<int>(x.dims) - 1, {}};
  std::iota(axes.axis, axes.axis + axes.count, 1);
  if (!in_order_of_elements)  // an insertion sort: std::stable_sort takes memory
    for (int i = 1; i < axes.count; ++i)
      for (int j = i; j > 0 && x.stride[axes.axis[j - 1]] < x.stride[axes.axis[j]]; --j)
        std::swap(axes.axis[j - 1], axes.axis[j]);
  return axes;
}

inline StepOperand step_operand(const StepView& t, const StepAxes& axes) {
  StepOperand o{};
  o.data = t.data;
  o.dtype = step_dtype(t.type);
  o.sample_stride = t.stride[0];
  for (int i = 0; i < axes.count; ++i) {
    const int64_t n = t.size[axes.axis[i]], s = t.stride[axes.axis[i]];
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

// Where a step writes; no data: it does not. In place what is stored goes to the sample's slot.
struct StepOutputs {
  StepView next, stored, model_input;
  int64_t copies;  // of the next model input, beside x' where that is one of them
  bool in_place;
};

inline void set_step_operands(SamplerStepParams& p, const StepView& x, const std::vector<StepView>& slots,
                              const SamplerStepArguments& a, const StepAxes& axes, const StepOutputs& to) {
  const auto set = [&](int name, const StepView& view) {
    if (view.data) p.operand[name] = step_operand(view, axes);
  };
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
  for (size_t k = 0; k < slots.size(); ++k) set(kSlots + static_cast<int>(k), slots[k]);
  set(kNext, to.next);
  set(kStored, to.stored);
  set(kModelInput, to.model_input);
  p.in_place = to.in_place;
  p.copies = static_cast<int>(to.copies);
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
  return p;
}

// The operators of one device. Device::made(t) has the last word on a new tensor, Device::run(x, on, slots, a, to) is
// one step of x, or nothing where x is empty.
template <class Device>
struct SamplerStepOperators {
  static std::vector<Tensor> functional(const Tensor& x, const std::vector<Tensor>& slots, const Tensor& model_output,
                                        const std::optional<Tensor>& uncond_output, const std::optional<Tensor>& noise,
                                        const std::optional<Tensor>& mask, const std::optional<Tensor>& known,
                                        const std::optional<Tensor>& known_noise, const Tensor& row,
                                        const std::optional<Tensor>& index, const std::optional<Tensor>& guidance,
                                        double scale, double rescale, std::optional<double> clip,
                                        std::optional<double> threshold, std::optional<int64_t> seed, int64_t step,
                                        int64_t first, bool store, int64_t copies, bool shared,
                                        ScalarType model_input_dtype) {
    const SamplerStepArguments a{model_output, uncond_output, noise,    mask,  known,   known_noise,
                                 row,          index,         guidance, scale, rescale, clip,
                                 threshold,    seed,          step,     first, copies,  model_input_dtype};
    check_step_dims(x.dim());
    const StepView view = step_view(x);
    check_sampler_step(view, x, slots.size(), a);
    const std::vector<StepView> slot_views = step_slots(slots, view, x);

    StepOutputs to{};
    std::vector<Tensor> outputs;
    outputs.reserve(3);
    const auto add = [&](const Tensor& t) {
      outputs.push_back(Device::made(t));
      return step_view(outputs.back());
    };
    if (!shared) to.next = add(new_like(view, x));
    if (store) to.stored = add(new_like(view, x));
    if (copies) to.model_input = add(new_model_input(view, x, a));
    to.copies = copies;
    if (shared) share(to, view, a);
    Device::run(view, x, slot_views, a, to);
    return outputs;
  }

  static Tensor in_place(const Tensor& state, const Tensor& model_output, const std::optional<Tensor>& uncond_output,
                         const std::optional<Tensor>& noise, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& known, const std::optional<Tensor>& known_noise,
                         const Tensor& row, const std::optional<Tensor>& index, const std::optional<Tensor>& guidance,
                         double scale, double rescale, std::optional<double> clip, std::optional<double> threshold,
                         std::optional<int64_t> seed, int64_t step, int64_t first, int64_t copies,
                         ScalarType model_input_dtype) {
    const SamplerStepArguments a{model_output, uncond_output, noise,    mask,  known,   known_noise,
                                 row,          index,         guidance, scale, rescale, clip,
                                 threshold,    seed,          step,     first, copies,  model_input_dtype};
    IMAGEGEN_CHECK(state.dim() >= 2 && state.size(0) > 0, "sampler_step_: state must be a tensor (1 + K, B, …), got ",
                   shape_string(state));
    check_step_dims(state.dim() - 1);
    const StepView x = step_view(state, 0);
    check_sampler_step(x, state, state.size(0) - 1, a);

    const Tensor model_input = Device::made(new_model_input(x, state, a));
    StepOutputs to{x, {}, {}, copies, true};
    if (copies) to.model_input = step_view(model_input);
    Device::run(x, state, step_slots(state), a, to);
    return model_input;
  }

 private:
  static Tensor new_like(const StepView& view, const Tensor& x) {
    return view.is_contiguous() ? new_dense(view, x, view.type, false) : torch::stable::empty_like(x);
  }

  // The next model input's memory format is x's where that is channels_last, else contiguous.
  static Tensor new_model_input(const StepView& x, const Tensor& on, const SamplerStepArguments& a) {
    StepView like = x;
    like.size[0] *= a.copies;
    return new_dense(like, on, a.model_input_dtype, x.is_channels_last());
  }

  // torch::stable::empty and new_empty look their operators up by name, and take a microsecond each.
  static Tensor new_dense(const StepView& like, const Tensor& on, ScalarType type, bool channels_last) {
    constexpr int64_t kLast[] = {1, 3, 2, 0};  // innermost first
    int64_t stride[kStepMaxDims], dense = 1;
    for (int64_t i = 0; i < like.dims; ++i) {
      const int64_t d = channels_last ? kLast[i] : like.dims - 1 - i;
      stride[d] = dense, dense *= std::max<int64_t>(like.size[d], 1);
    }
    int32_t device, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(on.get(), &index));
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        like.dims, like.size, stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device,
        index, &made));
    return Tensor(made);
  }

  // x' is the first copy of the next model input.
  static void share(StepOutputs& to, const StepView& x, const SamplerStepArguments& a) {
    IMAGEGEN_CHECK(a.copies > 0 && a.model_input_dtype == x.type,
                   "sampler_step: shared needs a copy of the next model input in x's dtype ", dtype_string(x.type));
    to.next = to.model_input;
    to.next.size[0] = x.size[0];
    --to.copies;
    const int64_t bytes = step_dtype(x.type) == Dtype::f64 ? 8 : step_dtype(x.type) == Dtype::f32 ? 4 : 2;
    to.model_input.data = static_cast<char*>(to.next.data) + x.size[0] * to.next.stride[0] * bytes;
  }
};

}  // namespace imagegen
