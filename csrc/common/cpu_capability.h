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
#define IMAGEGEN_PICK_KERNEL(kernel, dtype)                                                             \
  ([&] {                                                                                                \
    constexpr decltype(&baseline::kernel) table[] = {&baseline::kernel, &avx2::kernel, &avx512::kernel, \
                                                     &avx512_bf16::kernel};                             \
    return table[dtype == Dtype::f64 ? 0 : static_cast<int>(cpu_capability())];                         \
  }())
#else
#define IMAGEGEN_DECLARE_KERNEL(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }
#define IMAGEGEN_PICK_KERNEL(kernel, dtype) (&baseline::kernel)
#endif
