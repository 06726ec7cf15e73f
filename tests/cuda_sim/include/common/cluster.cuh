// In place of csrc/common/cluster.cuh: into each block a copy lands for itself, when SIM_ASYNC says.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/copy_barrier.cuh"

namespace imagegen::cuda {

inline int cluster_rank() {
  return cuda_sim::cluster_rank();
}
inline void cluster_arrive() {
  cuda_sim::cluster_arrive();
}
inline void cluster_wait() {
  cuda_sim::cluster_wait();
}

inline void copy_to_cluster(void* to, const void* from, int bytes, CopyBarrier& arrived, uint16_t blocks) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    throw std::runtime_error("cuda_sim: a bulk copy of an address or size at no multiple of 16");
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    void* const there = cuda_sim::of_block(to, rank);
    cuda_sim::copy_barrier_copy(cuda_sim::of_block(&arrived, rank), there, bytes,
                                [=] { std::memcpy(there, from, bytes); });
  }
}

}  // namespace imagegen::cuda
