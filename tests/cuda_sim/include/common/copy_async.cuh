// In place of csrc/common/copy_async.cuh: SIM_ASYNC says when a copy lands, between its issue and its wait.
#pragma once
#include "cuda_sim.h"

namespace imagegen::cuda {

inline void copy_async(void* to, const void* from, bool inside) {
  alignas(16) static const char zeros[16] = {};
  cuda_sim::copy_async(to, inside ? from : zeros, 16);
}
inline void copy_async_commit() {
  cuda_sim::copy_async_commit();
}
template <int kPending>
void copy_async_wait() {
  cuda_sim::copy_async_wait(kPending);
}

}  // namespace imagegen::cuda
