// Products of tiles in shared memory, for everything that tensor cores multiply: 16 bits at once, float in three parts
// or rounded to one.
#pragma once
#include <cuda_runtime.h>

#include "common/mma.cuh"
#include "common/scalar.cuh"

namespace imagegen::cuda {
namespace {

// Operands of the products, kDepth deep. A: 16 rows. B: two tiles of eight columns, as c[0] and c[1] take them.
// Accumulators hold rows group and group + 8, columns 2t and 2t + 1: {row, row, row + 8, row + 8}.
template <class S>
struct Product {
  static constexpr int kDepth = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];
  };

  // 16 rows of a tile, kDepth columns from p on.
  static __device__ __forceinline__ A rows(const S* p, int row) {
    const int lane = threadIdx.x % 32;
    A a;
    load_matrices(a.r, p + lane % 16 * row + lane / 16 * 8);
    return a;
  }
  // The same, to be multiplied by straight().
  static __device__ __forceinline__ A rows_for_straight(const S* p, int row) { return rows(p, row); }
  // Accumulators of kDepth columns as the operand of the next product.
  static __device__ __forceinline__ A accumulators(const float (*c)[4]) {
    return {{pack(c[0][0], c[0][1], S{}), pack(c[0][2], c[0][3], S{}), pack(c[1][0], c[1][1], S{}),
             pack(c[1][2], c[1][3], S{})}};
  }
  // B's 16 columns are 16 rows of a tile, kDepth columns from p on.
  static __device__ __forceinline__ B transposed(const S* p, int row) {
    const int lane = threadIdx.x % 32;
    B b;
    load_matrices(b.r, p + (lane / 16 * 8 + lane % 8) * row + lane / 8 % 2 * 8);
    return b;
  }
  // B is kDepth rows of a tile, 16 columns from p on.
  static __device__ __forceinline__ B straight(const S* p, int row) {
    const int lane = threadIdx.x % 32;
    B b;
    load_matrices_transposed(b.r, p + lane % 16 * row + lane / 16 * 8);
    return b;
  }
  static __device__ __forceinline__ void add(float (*c)[4], const A& a, const B& b) {
    mma(c[0], a.r, b.r[0], b.r[1], S{});
    mma(c[1], a.r, b.r[2], b.r[3], S{});
  }
};

// float as two tf32 numbers, which carry 22 of its 24 bits: three products instead of one, the smallest first; or as
// one.
template <bool kRounded>
struct FloatProduct {
  static constexpr int kDepth = 8;
  struct Split {
    uint32_t high[4], low[kRounded ? 1 : 4];
    __device__ __forceinline__ void set(int i, float x) {
      high[i] = to_tf32(x);
      if constexpr (!kRounded) low[i] = to_tf32(x - __uint_as_float(high[i]));
    }
  };
  using A = Split;
  using B = Split;

  static __device__ __forceinline__ A rows(const float* p, int row) {
    p += threadIdx.x % 32 / 4 * row + threadIdx.x % 4;
    A a;
    a.set(0, p[0]), a.set(1, p[8 * row]), a.set(2, p[4]), a.set(3, p[8 * row + 4]);
    return a;
  }
  // Depth is counted 0, 2, 4, 6, 1, 3, 5, 7, so that every lane keeps its accumulators; straight() counts alike.
  static __device__ __forceinline__ A rows_for_straight(const float* p, int row) {
    p += threadIdx.x % 32 / 4 * row + threadIdx.x % 4 * 2;
    A a;
    a.set(0, p[0]), a.set(1, p[8 * row]), a.set(2, p[1]), a.set(3, p[8 * row + 1]);
    return a;
  }
  static __device__ __forceinline__ A accumulators(const float (*c)[4]) {
    A a;
    a.set(0, c[0][0]), a.set(1, c[0][2]), a.set(2, c[0][1]), a.set(3, c[0][3]);
    return a;
  }
  static __device__ __forceinline__ B transposed(const float* p, int row) {
    p += threadIdx.x % 32 / 4 * row + threadIdx.x % 4;
    B b;
    b.set(0, p[0]), b.set(1, p[4]), b.set(2, p[8 * row]), b.set(3, p[8 * row + 4]);
    return b;
  }
  static __device__ __forceinline__ B straight(const float* p, int row) {
    p += threadIdx.x % 4 * 2 * row + threadIdx.x % 32 / 4;
    B b;
    b.set(0, p[0]), b.set(1, p[row]), b.set(2, p[8]), b.set(3, p[row + 8]);
    return b;
  }
  static __device__ __forceinline__ void add(float (*c)[4], const A& a, const B& b) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (!kRounded) {
        mma(c[j], a.low, b.high[2 * j], b.high[2 * j + 1], float{});
        mma(c[j], a.high, b.low[2 * j], b.low[2 * j + 1], float{});
      }
      mma(c[j], a.high, b.high[2 * j], b.high[2 * j + 1], float{});
    }
  }
};
template <>
struct Product<float> : FloatProduct<false> {};
template <>
struct Product<Tf32> : FloatProduct<true> {};

}  // namespace
}  // namespace imagegen::cuda
