// One voice for errors: "<op>: <argument> must ..., got ...", word for word what the Python functions say.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "activation.h"
#include "scalar.h"

#define IMAGEGEN_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace imagegen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const std::vector<int64_t>& sizes) {
  std::string s = "(";
  for (size_t d = 0; d < sizes.size(); ++d) s.append(d ? ", " : "").append(std::to_string(sizes[d]));
  return s.append(sizes.size() == 1 ? ",)" : ")");
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

inline std::string shape_string(const Tensor& t) {
  return shape_string(shape_of(t));
}

inline std::string dtype_string(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    default: return "another dtype";
  }
}

inline Dtype check_dtype(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      IMAGEGEN_CHECK(false, op, ": ", argument, " must be float32, bfloat16, float16 or float64, got ",
                     dtype_string(t.scalar_type()));
  }
}

inline void check_same_dtype(const char* op, const char* argument, const Tensor& t, const Tensor& x,
                             const char* name = "x") {
  IMAGEGEN_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", argument, " must have ", name, "'s dtype ",
                 dtype_string(x.scalar_type()), ", got ", dtype_string(t.scalar_type()));
}

inline std::string device_string(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : t.is_cpu() ? "cpu" : "another device";
}

inline void check_same_device(const char* op, const char* argument, const Tensor& t, const Tensor& x,
                              const char* name = "x") {
  IMAGEGEN_CHECK(t.device() == x.device(), op, ": ", argument, " must be on ", name, "'s device ", device_string(x),
                 ", got ", device_string(t));
}

inline void check_shape(const char* op, const char* argument, const Tensor& t,
                        torch::headeronly::IntHeaderOnlyArrayRef shape, const Tensor& x) {
  IMAGEGEN_CHECK(t.sizes() == shape, op, ": ", argument, " must have shape ", shape_string(shape.vec()), " to match x ",
                 shape_string(x), ", got ", shape_string(t));
}

// What every convolution with a 3x3 kernel asks; returns the number of output channels.
inline int64_t check_conv3x3(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_dtype(op, "x", x);
  IMAGEGEN_CHECK(x.dim() == 4, op, ": x must have shape (B, C, H, W), got ", shape_string(x));
  check_same_device(op, "weight", weight, x);
  check_same_dtype(op, "weight", weight, x);
  IMAGEGEN_CHECK(weight.dim() == 4, op, ": weight must have shape (Cout, C, 3, 3), got ", shape_string(weight));
  const int64_t cout = weight.size(0);
  check_shape(op, "weight", weight, {cout, x.size(1), 3, 3}, x);
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_same_dtype(op, "bias", *bias, x);
    IMAGEGEN_CHECK(bias->dim() == 1 && bias->size(0) == cout, op, ": bias must have shape (", cout,
                   ",) to match weight ", shape_string(weight), ", got ", shape_string(*bias));
  }
  return cout;
}

inline Activation check_activation(const char* op, const char* argument, const std::string& name) {
  constexpr const char* names[] = {"linear", "relu", "lrelu", "silu", "gelu", "tanh", "sigmoid"};
  for (int i = 0; i < 7; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  IMAGEGEN_CHECK(false, op, ": ", argument, " must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got '",
                 name, "'");
}

}  // namespace imagegen
