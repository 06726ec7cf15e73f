// One voice for errors: "<op>: <argument> must ..., got ...", word for word what the Python functions say.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "activation.h"
#include "scalar.h"

#define IMAGEGEN_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace imagegen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + (t.dim() == 1 ? ",)" : ")");
}

inline std::string dtype_string(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
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

inline void check_same_dtype(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  IMAGEGEN_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", argument, " must have x's dtype ",
                 dtype_string(x.scalar_type()), ", got ", dtype_string(t.scalar_type()));
}

inline Activation check_activation(const char* op, const char* argument, const std::string& name) {
  constexpr const char* names[] = {"linear", "relu", "lrelu", "silu", "gelu", "tanh", "sigmoid"};
  for (int i = 0; i < 7; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  IMAGEGEN_CHECK(false, op, ": ", argument, " must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got '",
                 name, "'");
}

}  // namespace imagegen
