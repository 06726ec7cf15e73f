// The element types tensors arrive in, as plain bits: no torch header reaches the kernels.
#pragma once
#include <cstdint>

namespace imagegen {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum class Dtype : int { f32, f64, bf16, f16 };

}  // namespace imagegen
