// In place of csrc/common/mma.cuh: the lanes of a warp show one another their operands and multiply them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/scalar.h"
#include "cuda_sim.h"

namespace imagegen::cuda {

inline float value_of(uint16_t bits, bf16) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}
inline float value_of(uint16_t bits, fp16) {
  return __half2float(__half(__half_raw{bits}));
}
inline float value_of(uint32_t bits, float) {
  if (bits & 0x1FFF) throw std::runtime_error("cuda_sim: an operand of mma is not in tf32");
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
template <class S>
float half_of(uint32_t pair, int i) {
  return value_of(static_cast<uint16_t>(pair >> 16 * i), S{});
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

// c += a b, where a_at(operands of its lane, row / 8, k) and b_at do the unpacking and owner(k) is the lane's t.
template <class Owner, class A, class B>
void mma_over(int depth, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Owner owner, A a_at, B b_at) {
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  cuda_sim::exchange_begin(~0u, &mine, sizeof mine);
  const auto of = [](int lane) -> const MmaOperands& { return *static_cast<const MmaOperands*>(cuda_sim::peer(lane)); };
  const int group = cuda_sim::lane() / 4, t = cuda_sim::lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < depth; ++k)
      c[i] += a_at(of(group * 4 + owner(k)), i / 2, k) * b_at(of((2 * t + i % 2) * 4 + owner(k)), k);
  cuda_sim::exchange_end(~0u);
}

template <class S>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, S) {
  mma_over(
      16, c, a, b0, b1, [](int k) { return k % 8 / 2; },
      [](const MmaOperands& o, int half, int k) { return half_of<S>(o.a[half + k / 8 * 2], k % 2); },
      [](const MmaOperands& o, int k) { return half_of<S>(o.b[k / 8], k % 2); });
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  mma_over(
      8, c, a, b0, b1, [](int k) { return k % 4; },
      [](const MmaOperands& o, int half, int k) { return value_of(o.a[half + k / 4 * 2], float{}); },
      [](const MmaOperands& o, int k) { return value_of(o.b[k / 4], float{}); });
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x1000) & ~0x1FFFu;  // to nearest, halves away from zero
}

inline const char* matrix_row(int matrix, int row) {
  return *static_cast<const char* const*>(cuda_sim::peer(matrix * 8 + row));
}
inline void begin_load_matrices(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("cuda_sim: ldmatrix of a row not at 16 bytes");
  cuda_sim::exchange_begin(~0u, &row, sizeof row);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  begin_load_matrices(row);
  const int group = cuda_sim::lane() / 4, t = cuda_sim::lane() % 4;
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], matrix_row(i, group) + 4 * t, 4);
  cuda_sim::exchange_end(~0u);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  begin_load_matrices(row);
  const int group = cuda_sim::lane() / 4, t = cuda_sim::lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 2; ++k)
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * k, matrix_row(i, 2 * t + k) + 2 * group, 2);
  cuda_sim::exchange_end(~0u);
}

inline uint32_t pack(float low, float high, bf16) {
  const uint32_t l = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(low)).x;
  return l | uint32_t{static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(high)).x} << 16;
}
inline uint32_t pack(float low, float high, fp16) {
  const uint32_t l = static_cast<__half_raw>(__float2half_rn(low)).x;
  return l | uint32_t{static_cast<__half_raw>(__float2half_rn(high)).x} << 16;
}

template <class S>
uint32_t add(uint32_t a, uint32_t b, S) {
  return pack(half_of<S>(a, 0) + half_of<S>(b, 0), half_of<S>(a, 1) + half_of<S>(b, 1), S{});
}
template <class S>
uint32_t subtract(uint32_t a, uint32_t b, S) {
  return pack(half_of<S>(a, 0) - half_of<S>(b, 0), half_of<S>(a, 1) - half_of<S>(b, 1), S{});
}
inline uint32_t add(uint32_t a, uint32_t b, float) {
  return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
}
inline uint32_t subtract(uint32_t a, uint32_t b, float) {
  return __float_as_uint(__uint_as_float(a) - __uint_as_float(b));
}

inline float exp2_approximate(float x) {
  return std::exp2(x);
}

}  // namespace imagegen::cuda
