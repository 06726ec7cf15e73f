// Clusters of blocks (sm_90 and later), which run at the same time and write into each other's shared memory. The
// simulator in tests/cuda_sim puts its own file in place of this one.
#pragma once
#include "common/copy_barrier.cuh"

namespace imagegen::cuda {

// This block's place in its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// A barrier of all threads of the cluster in two halves. Nothing of another block is reached before its first one, nor
// after its last: barriers are not there yet, or the block is gone.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Bytes, read once, to the same place of the shared memory of every block in `blocks`, a bit for each rank; `arrived`
// of each counts them. Addresses and bytes: multiples of 16. Written through the proxy that wgmma reads through.
__device__ __forceinline__ void copy_to_cluster(void* to, const void* from, int bytes, CopyBarrier& arrived,
                                                uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(bytes), "r"(arrived.at()), "h"(blocks)
      : "memory");
}

}  // namespace imagegen::cuda
