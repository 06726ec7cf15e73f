// Copies from global to shared memory that go on while the thread does other things (cp.async, sm_80 and later). The
// simulator in tests/cuda_sim puts its own file in place of this one.
#pragma once
#include <cstdint>

namespace imagegen::cuda {

// 16 bytes, or 16 zeros where there are none to copy; both addresses at multiples of 16, `from` a legal one always.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  const uint32_t p = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(p), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until all but this thread's newest `kPending` groups are there; other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace imagegen::cuda
