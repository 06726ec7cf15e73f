// A block-wide running sum: right where bug is 0, wrong in one way with each other number.
//   1: no barrier between the steps   2: a barrier that a part of a warp does not reach   3: shared memory nobody wrote
//   4: a shuffle that not all lanes of its mask take part in
#include <exception>
#include <string>

#include "common/launch.cuh"

namespace {

using imagegen::cuda::dynamic_shared;
using imagegen::cuda::launch;

constexpr int kThreads = 128;

__global__ void running_sum_kernel(const float* x, float* y, int bug) {
  float* sums[] = {dynamic_shared<float>(), dynamic_shared<float>() + kThreads};
  const int i = threadIdx.x;
  if (bug != 3 || i != 5) sums[0][i] = x[i];
  if (bug != 2 || i < 40)
    __syncthreads();
  else
    __syncwarp();
  int from = 0;
  for (int distance = 1; distance < kThreads; distance *= 2, from ^= 1) {
    sums[from ^ 1][i] = sums[from][i] + (i >= distance ? sums[from][i - distance] : 0.f);
    if (bug != 1) __syncthreads();
  }
  float total = sums[from][i];
  if (bug != 4 || i % 32 < 20) total = __shfl_xor_sync(~0u, __shfl_xor_sync(~0u, total, 1), 1);
  y[i] = total;
}

}  // namespace

extern "C" const char* running_sum(const float* x, float* y, int bug) {
  static std::string error;
  try {
    launch(running_sum_kernel, 1, kThreads, 2 * kThreads * sizeof(float), nullptr, x, y, bug);
    return nullptr;
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
}
