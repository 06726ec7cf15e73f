// Runs CUDA kernels on the CPU, so that tests can check them without a GPU.
//
// A .cu file compiled as C++ with `-include cuda_sim.h` keeps NVIDIA's own headers for the types (dim3,
// __nv_bfloat16, ...) and gets from here what only device compilers know: threadIdx, barriers, warp shuffles, shared
// memory. Each CUDA thread of a block is a fiber; a barrier or shuffle parks it until the others it waits for are
// there. Blocks run one after another, those of a cluster together. Which warp runs ahead of the others, SIM_ORDER
// says: see README.md.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __shared__
#define __shared__ static  // blocks run one after another; those of clusters have dynamic shared memory alone
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace cuda_sim {

struct Coordinates {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};

// Of the running thread.
const Coordinates& here();
int lane();
void* dynamic_shared();

void block_barrier();
void warp_barrier(unsigned mask);  // orders memory, as __syncwarp does

// Every lane of mask shows its bytes; afterwards peer(l) is what lane l showed, until exchange_end().
void exchange_begin(unsigned mask, const void* data, size_t bytes);
const void* peer(int lane);
void exchange_end(unsigned mask);

// cp.async: the copy lands between its issue and the wait that its group is in. SIM_ASYNC says when: see README.md.
void copy_async(void* to, const void* from, size_t bytes);
void copy_async_commit();
void copy_async_wait(int newest_left_pending);

// wgmma: the product runs between its issue and the wait that its group is in, at one of the two as SIM_ASYNC says.
void product_async(std::function<void()> product);
void product_async_commit();
void product_async_wait(int newest_left_pending);

// mbarrier with so many arrivals a phase, and copies that count on it: they land between their issue and the end of a
// wait for them, at the issue or when somebody waits, as SIM_ASYNC says. An arrival may announce bytes of copies. Waits
// for the end of the phase of this parity.
void copy_barrier_init(const void* barrier, int arrivals);
void copy_barrier_arrive(const void* barrier, int64_t bytes = 0);
void copy_barrier_copy(const void* barrier, void* to, int64_t bytes, std::function<void()> copy);
void copy_barrier_wait(const void* barrier, int parity);

// Clusters: the place in another block's dynamic shared memory of p in this one's, the barrier of all their threads.
int cluster_rank();
void* of_block(const void* p, int rank);
void cluster_arrive();
void cluster_wait();

// blocks_of_cluster, neighbours along x, are alive together.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, int blocks_of_cluster = 1);

template <class T>
T shuffle(unsigned mask, T value, int from) {
  exchange_begin(mask, &value, sizeof value);
  std::memcpy(&value, peer(from), sizeof value);
  exchange_end(mask);
  return value;
}

}  // namespace cuda_sim

#define threadIdx (::cuda_sim::here().thread)
#define blockIdx (::cuda_sim::here().block)
#define blockDim (::cuda_sim::here().block_dim)
#define gridDim (::cuda_sim::here().grid_dim)

inline void __syncthreads() {
  cuda_sim::block_barrier();
}
inline void __syncwarp(unsigned mask = ~0u) {
  cuda_sim::warp_barrier(mask);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int from) {
  return cuda_sim::shuffle(mask, v, from % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x) {
  return cuda_sim::shuffle(mask, v, cuda_sim::lane() ^ x);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int by) {
  const int l = cuda_sim::lane();
  return cuda_sim::shuffle(mask, v, l + by < 32 ? l + by : l);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int by) {
  const int l = cuda_sim::lane();
  return cuda_sim::shuffle(mask, v, l >= by ? l - by : l);
}
template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  const T old = *p;  // fibers of one thread: nothing comes between
  *p = old + v;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __uint_as_float(unsigned bits) {
  return __int_as_float(static_cast<int>(bits));
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
#define rsqrtf(x) (1.f / std::sqrt(x))
