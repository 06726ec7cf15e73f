#include "ops/group_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu_capability.h"
#include "common/layout.h"
#include "common/memory.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(void group_norm_kernel(const GroupNormParams&))

namespace {

using torch::headeronly::MemoryFormat;

Tensor empty(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype,
             MemoryFormat format = MemoryFormat::Contiguous) {
  Tensor t = torch::stable::empty(shape, dtype, std::nullopt, x.device(), std::nullopt, format);
  advise_huge(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// t itself where the kernel can walk it, else a copy in the layout it can: a transposed view costs that copy.
Tensor walkable(const Tensor& t, bool channels_last, int64_t pixels) {
  if (group_norm_walks(t, channels_last || pixels == 1)) return t;
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

int64_t pixels_of(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  return pixels;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_cpu(const Tensor& x, int64_t num_groups,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps,
                                                  const std::optional<Tensor>& scale,
                                                  const std::optional<Tensor>& shift, const std::string& activation) {
  check_group_norm(x, num_groups, eps);
  const bool channels_last = is_channels_last(x);
  const Tensor x_walked = walkable(x, channels_last, pixels_of(x));
  Tensor y =
      empty(x, x.sizes(), x.scalar_type(), channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Tensor mean = empty(x, {x.size(0), num_groups}, statistics_dtype(x));
  Tensor rstd = empty(x, {x.size(0), num_groups}, statistics_dtype(x));
  GroupNormParams params = group_norm_params(x_walked, std::nullopt, y, channels_last, num_groups, weight, bias, eps,
                                             scale, shift, activation);
  params.mean = mean.mutable_data_ptr();
  params.rstd = rstd.mutable_data_ptr();
  IMAGEGEN_PICK_KERNEL(group_norm_kernel, params.dtype)(params);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> group_norm_factors_cpu(const Tensor& x, int64_t num_groups,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps,
                                                  const std::optional<Tensor>& scale,
                                                  const std::optional<Tensor>& shift) {
  check_group_norm(x, num_groups, eps);
  const bool channels_last = is_channels_last(x);
  const Tensor x_walked = walkable(x, channels_last, pixels_of(x));
  Tensor mean = empty(x, {x.size(0), num_groups}, statistics_dtype(x));
  Tensor rstd = empty(x, {x.size(0), num_groups}, statistics_dtype(x));
  Tensor gain = empty(x, {x.size(0), x.size(1)}, statistics_dtype(x));
  Tensor offset = empty(x, {x.size(0), x.size(1)}, statistics_dtype(x));
  GroupNormParams params = group_norm_params(x_walked, std::nullopt, std::nullopt, channels_last, num_groups, weight,
                                             bias, eps, scale, shift, "linear");
  params.mean = mean.mutable_data_ptr();
  params.rstd = rstd.mutable_data_ptr();
  params.gain = gain.mutable_data_ptr();
  params.offset = offset.mutable_data_ptr();
  IMAGEGEN_PICK_KERNEL(group_norm_kernel, params.dtype)(params);
  return {gain, offset};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation) {
  check_group_norm(x, num_groups, 0);
  check_same_dtype("group_norm", "grad", grad, x);
  IMAGEGEN_CHECK(shape_string(grad) == shape_string(x), "group_norm: grad must have x's shape ", shape_string(x),
                 ", got ", shape_string(grad));
  const std::pair<const char*, const Tensor&> statistics[] = {{"mean", mean}, {"rstd", rstd}};
  for (const auto& [argument, t] : statistics) {
    const std::string shape = "(" + std::to_string(x.size(0)) + ", " + std::to_string(num_groups) + ")";
    IMAGEGEN_CHECK(t.scalar_type() == statistics_dtype(x) && shape_string(t) == shape && t.is_contiguous(),
                   "group_norm: ", argument, " must be contiguous of shape ", shape, " and dtype ",
                   dtype_string(statistics_dtype(x)), ", got ", shape_string(t), " of ", dtype_string(t.scalar_type()));
  }
  const bool channels_last = is_channels_last(x);
  const Tensor x_walked = walkable(x, channels_last, pixels_of(x));
  const Tensor grad_walked = walkable(grad, channels_last, pixels_of(x));
  Tensor dx =
      empty(x, x.sizes(), x.scalar_type(), channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Tensor sum_dz = empty(x, {x.size(0), x.size(1)}, statistics_dtype(x));
  Tensor sum_dz_xhat = empty(x, {x.size(0), x.size(1)}, statistics_dtype(x));
  GroupNormParams params = group_norm_params(x_walked, grad_walked, dx, channels_last, num_groups, weight, bias, 0,
                                             scale, shift, activation);
  params.mean = mean.mutable_data_ptr();
  params.rstd = rstd.mutable_data_ptr();
  params.sum_dz = sum_dz.mutable_data_ptr();
  params.sum_dz_xhat = sum_dz_xhat.mutable_data_ptr();
  IMAGEGEN_PICK_KERNEL(group_norm_kernel, params.dtype)(params);
  return {dx, sum_dz, sum_dz_xhat};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imagegen, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&group_norm_cpu));
  m.impl("group_norm_factors", TORCH_BOX(&group_norm_factors_cpu));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward_cpu));
}

}  // namespace imagegen
