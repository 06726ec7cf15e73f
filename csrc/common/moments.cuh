// Mean and variance of many numbers, in lots that merge (Chan et al. 1979): nothing cancels, however far from zero.
#pragma once
#include <cuda_runtime.h>

namespace imagegen::cuda {
namespace {

// Count, mean and centred sum of squares.
template <class T>
struct Moments {
  T n, mean, m2;
};

template <class T>
__device__ __forceinline__ Moments<T> merge(const Moments<T>& a, const Moments<T>& b) {
  const T n = a.n + b.n;
  if (n == T(0)) return a;
  const T share = b.n / n, d = b.mean - a.mean;
  return {n, a.mean + d * share, a.m2 + b.m2 + d * d * a.n * share};
}

// Those of another lane.
template <class T>
__device__ __forceinline__ Moments<T> exchange(const Moments<T>& m, int from) {
  return {__shfl_sync(~0u, m.n, from), __shfl_sync(~0u, m.mean, from), __shfl_sync(~0u, m.m2, from)};
}

}  // namespace
}  // namespace imagegen::cuda
