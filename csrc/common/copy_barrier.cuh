// Barriers in shared memory (mbarrier, sm_90 and later) that tell everyone when the bytes of copies are there, or all
// who were to arrive have. The simulator in tests/cuda_sim puts its own file in place of this one.
//
//   one thread:    barrier.init(), before a __syncthreads(), or the cluster's barrier if other blocks get to see it
//   one thread:    barrier.expect(bytes), then copies of as many bytes; that is one phase
//   all that read: barrier.wait(phase % 2), for each phase before the next one is asked for
//
// A phase ends with the last of its bytes and arrivals, of which expect() is one. Bytes may arrive before it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace imagegen::cuda {

class CopyBarrier {
 public:
  __device__ __forceinline__ void init(int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;" ::"r"(at()),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at()), "r"(bytes) : "memory");
  }
  // Arrives at the same barrier of another block of the cluster: after what this thread has read, which may then be
  // written over. It need not see what this thread has written: that would take a fence of the whole GPU's memory.
  __device__ __forceinline__ void arrive_at(int rank) {
    asm volatile(
        "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(at()),
        "r"(rank)
        : "memory");
  }
  __device__ __forceinline__ void wait(int parity) {
    uint32_t done;
    do {
      asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                   : "=r"(done)
                   : "r"(at()), "r"(parity)
                   : "memory");
    } while (!done);
  }
  __device__ __forceinline__ uint32_t at() const { return static_cast<uint32_t>(__cvta_generic_to_shared(this)); }

 private:
  uint64_t state_;
};

}  // namespace imagegen::cuda
