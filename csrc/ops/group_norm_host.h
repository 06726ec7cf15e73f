// group_norm's operators, the same on every device: validate, make the outputs, fill the parameters, run.
#pragma once
#include <tuple>

#include "common/layout.h"
#include "ops/group_norm.h"

namespace imagegen {

// Device has empty(x, shape, dtype, format), an uninitialised tensor on x's device, and run(params, x), which computes.
template <class Device>
struct GroupNormOperators {
  using Format = torch::headeronly::MemoryFormat;
  using Factor = std::optional<Tensor>;

  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, int64_t num_groups, const Factor& weight,
                                                    const Factor& bias, double eps, const Factor& scale,
                                                    const Factor& shift, const std::string& activation) {
    return forward_with(x, num_groups, weight, bias, eps, scale, shift, activation, std::nullopt);
  }

  static std::tuple<Tensor, Tensor, Tensor> with_moments(const Tensor& x, int64_t num_groups, const Factor& weight,
                                                         const Factor& bias, double eps, const Factor& scale,
                                                         const Factor& shift, const std::string& activation,
                                                         const Tensor& moments) {
    return forward_with(x, num_groups, weight, bias, eps, scale, shift, activation, moments);
  }

  static std::tuple<Tensor, Tensor> factors(const Tensor& x, int64_t num_groups, const Factor& weight,
                                            const Factor& bias, double eps, const Factor& scale, const Factor& shift) {
    check_group_norm(x, num_groups, eps);
    const bool channels_last = is_channels_last(x);
    const Tensor x_walked = walkable(x, channels_last);
    Tensor mean = statistic(x, num_groups), rstd = statistic(x, num_groups);
    Tensor gain = statistic(x, x.size(1)), offset = statistic(x, x.size(1));
    GroupNormParams params = group_norm_params(x_walked, std::nullopt, std::nullopt, channels_last, num_groups, weight,
                                               bias, eps, scale, shift, "linear");
    params.mean = mean.mutable_data_ptr();
    params.rstd = rstd.mutable_data_ptr();
    params.gain = gain.mutable_data_ptr();
    params.offset = offset.mutable_data_ptr();
    Device::run(params, x);
    return {gain, offset};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                     const Tensor& rstd, int64_t num_groups, const Factor& weight,
                                                     const Factor& bias, const Factor& scale, const Factor& shift,
                                                     const std::string& activation) {
    check_group_norm(x, num_groups, 0);
    check_same_dtype("group_norm", "grad", grad, x);
    IMAGEGEN_CHECK(shape_string(grad) == shape_string(x), "group_norm: grad must have x's shape ", shape_string(x),
                   ", got ", shape_string(grad));
    check_statistics("mean", mean, x, std::to_string(num_groups));
    check_statistics("rstd", rstd, x, std::to_string(num_groups));
    const bool channels_last = is_channels_last(x);
    const Tensor x_walked = walkable(x, channels_last), grad_walked = walkable(grad, channels_last);
    Tensor dx = output_like(x, channels_last);
    Tensor sum_dz = statistic(x, x.size(1)), sum_dz_xhat = statistic(x, x.size(1));
    GroupNormParams params = group_norm_params(x_walked, grad_walked, dx, channels_last, num_groups, weight, bias, 0,
                                               scale, shift, activation);
    params.mean = mean.mutable_data_ptr();
    params.rstd = rstd.mutable_data_ptr();
    params.sum_dz = sum_dz.mutable_data_ptr();
    params.sum_dz_xhat = sum_dz_xhat.mutable_data_ptr();
    Device::run(params, x);
    return {dx, sum_dz, sum_dz_xhat};
  }

 private:
  static std::tuple<Tensor, Tensor, Tensor> forward_with(const Tensor& x, int64_t num_groups, const Factor& weight,
                                                         const Factor& bias, double eps, const Factor& scale,
                                                         const Factor& shift, const std::string& activation,
                                                         const std::optional<Tensor>& moments) {
    check_group_norm(x, num_groups, eps);
    if (moments) {
      check_same_device("group_norm", "moments", *moments, x);
      check_statistics("moments", *moments, x, std::to_string(num_groups) + ", 2");
    }
    const bool channels_last = is_channels_last(x);
    const Tensor x_walked = walkable(x, channels_last);
    Tensor y = output_like(x, channels_last), mean = statistic(x, num_groups), rstd = statistic(x, num_groups);
    GroupNormParams params = group_norm_params(x_walked, std::nullopt, y, channels_last, num_groups, weight, bias, eps,
                                               scale, shift, activation);
    params.moments = moments ? moments->const_data_ptr() : nullptr;
    params.mean = mean.mutable_data_ptr();
    params.rstd = rstd.mutable_data_ptr();
    Device::run(params, x);
    return {y, mean, rstd};
  }

  // `rest`: the sizes behind that of the batch.
  static void check_statistics(const char* argument, const Tensor& t, const Tensor& x, const std::string& rest) {
    const std::string shape = "(" + std::to_string(x.size(0)) + ", " + rest + ")";
    IMAGEGEN_CHECK(t.scalar_type() == statistics_dtype(x) && shape_string(t) == shape && t.is_contiguous(),
                   "group_norm: ", argument, " must be contiguous of shape ", shape, " and dtype ",
                   dtype_string(statistics_dtype(x)), ", got ", shape_string(t), " of ", dtype_string(t.scalar_type()));
  }

  static ScalarType statistics_dtype(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Per image and group, or per image and channel.
  static Tensor statistic(const Tensor& x, int64_t n) {
    return Device::empty(x, {x.size(0), n}, statistics_dtype(x), Format::Contiguous);
  }

  static Tensor output_like(const Tensor& x, bool channels_last) {
    return Device::empty(x, shape_of(x), x.scalar_type(), channels_last ? Format::ChannelsLast : Format::Contiguous);
  }

  // t itself where the kernel can walk it, else a copy in the layout it can: a transposed view costs that copy.
  static Tensor walkable(const Tensor& t, bool channels_last) {
    int64_t pixels = 1;
    for (int64_t d = 2; d < t.dim(); ++d) pixels *= t.size(d);
    if (group_norm_walks(t, channels_last || pixels == 1)) return t;
    return torch::stable::contiguous(t, channels_last ? Format::ChannelsLast : Format::Contiguous);
  }
};

}  // namespace imagegen
