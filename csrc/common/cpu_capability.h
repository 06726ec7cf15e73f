// Kernels are compiled once per instruction set; the best one the machine has is picked at run time.
//
// A kernel file wraps everything in `namespace imagegen::IMAGEGEN_CAPABILITY` and includes no torch header and no
// library template: an inline function shared with another file could be linked in from the AVX-512 build of it.
#pragma once
#include "scalar.h"

namespace imagegen {

enum class CpuCapability : int { baseline, avx2, avx512, avx512_bf16 };

constexpr const char* kCpuCapabilityNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The one in use: the machine's best unless set lower (tests run every one the machine has).
CpuCapability cpu_capability();
CpuCapability best_cpu_capability();
void set_cpu_capability(CpuCapability capability);
// Whether the machine's processor is one for which Intel's libraries take their best kernels.
bool cpu_is_intel();

// The instruction set that computes a dtype: double is for gradient checks, and built once, in the baseline; the
// avx512_bf16 kernels are built for bf16 alone.
inline CpuCapability capability_for(Dtype dtype) {
  const CpuCapability best = cpu_capability();
  if (dtype == Dtype::f64) return CpuCapability::baseline;
  return dtype == Dtype::bf16 || best < CpuCapability::avx512 ? best : CpuCapability::avx512;
}

// The same for sums over so many channels. Few stay in float: the rounding errors of bf16 dot products do not average
// out, and they cost little.
inline CpuCapability capability_for(Dtype dtype, int64_t channels) {
  return capability_for(dtype == Dtype::bf16 && channels < 32 ? Dtype::f32 : dtype);
}

}  // namespace imagegen

#if defined(__x86_64__)
#define IMAGEGEN_DECLARE_KERNEL(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx512_bf16 {            \
  __VA_ARGS__;                       \
  }
#define IMAGEGEN_PICK_KERNEL(kernel, ...)                                                               \
  ([&] {                                                                                                \
    constexpr decltype(&baseline::kernel) table[] = {&baseline::kernel, &avx2::kernel, &avx512::kernel, \
                                                     &avx512_bf16::kernel};                             \
    return table[static_cast<int>(capability_for(__VA_ARGS__))];                                        \
  }())
#else
#define IMAGEGEN_DECLARE_KERNEL(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }
#define IMAGEGEN_PICK_KERNEL(kernel, ...) (&baseline::kernel)
#endif
