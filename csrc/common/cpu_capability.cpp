#include "cpu_capability.h"

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace imagegen {
namespace {

CpuCapability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);  // clang 14's __builtin_cpu_supports knows no f16c
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (ecx & bit_F16C) != 0;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::avx512_bf16;
  if (avx512) return CpuCapability::avx512;
  if (avx2) return CpuCapability::avx2;
#endif
  return CpuCapability::baseline;
}

std::atomic<CpuCapability>& current() {
  static std::atomic<CpuCapability> capability{detect()};
  return capability;
}

}  // namespace

CpuCapability cpu_capability() {
  return current().load(std::memory_order_relaxed);
}

CpuCapability best_cpu_capability() {
  static const CpuCapability best = detect();
  return best;
}

void set_cpu_capability(CpuCapability capability) {
  current().store(capability);
}

bool cpu_is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace imagegen
