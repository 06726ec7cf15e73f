// torch's switch for convolutions in TF32, as an operator that Python implements: the stable ABI has no name for it.
#pragma once
#include <torch/csrc/stable/library.h>

#include <array>

#include "common/check.h"

namespace imagegen {

// Whether a convolution of x may round it to TF32. Asked at every call, about 5 us for float32 and nothing for others.
inline bool allow_tf32(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float) return false;
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("imagegen::allow_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

}  // namespace imagegen
