// In place of csrc/common/copy_barrier.cuh.
#pragma once
#include <cstdint>

#include "cuda_sim.h"

namespace imagegen::cuda {

class CopyBarrier {
 public:
  void init(int arrivals = 1) { cuda_sim::copy_barrier_init(this, arrivals); }
  void expect(int bytes) { cuda_sim::copy_barrier_arrive(this, bytes); }
  void arrive_at(int rank) { cuda_sim::copy_barrier_arrive(cuda_sim::of_block(this, rank)); }
  void wait(int parity) { cuda_sim::copy_barrier_wait(this, parity); }

 private:
  uint64_t state_;
};

}  // namespace imagegen::cuda
