// In place of csrc/common/wgmma.cuh: SIM_ASYNC says whether a product reads shared memory at its issue or at its wait.
#pragma once
#include "common/mma.cuh"

#define IMAGEGEN_HAS_WGMMA

namespace imagegen::cuda {

enum class Swizzle : int { none, bytes128 };
enum class Major : int { depth, columns };

struct SharedOperand {
  const char* p;
  Swizzle swizzle;
  int leading, stride;
  SharedOperand plus(int bytes) const { return {p + bytes, swizzle, leading, stride}; }
};
inline SharedOperand shared_operand(const void* p, Swizzle swizzle, int leading, int stride) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw std::runtime_error("cuda_sim: an operand of wgmma not at 16 bytes");
  return {static_cast<const char*>(p), swizzle, leading, stride};
}
// Element (k, n) of the operand, 16 bits.
template <Major kMajor>
uint16_t element_of(const SharedOperand& b, int k, int n) {
  const int along = kMajor == Major::depth ? k : n, across = kMajor == Major::depth ? n : k;
  intptr_t offset;
  if (b.swizzle == Swizzle::none)
    offset = n / 8 * b.stride + k / 8 * b.leading + across % 8 * 16 + along % 8 * 2;
  else
    offset = along / 64 * b.leading + across / 8 * b.stride + across % 8 * 128 + along % 64 * 2;
  uintptr_t address = reinterpret_cast<uintptr_t>(b.p) + offset;
  if (b.swizzle == Swizzle::bytes128) address ^= address >> 3 & 0x70;
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const void*>(address), sizeof bits);
  return bits;
}

inline void wgmma_fence() {}
inline void async_proxy_fence() {}
inline void wgmma_commit() {
  cuda_sim::product_async_commit();
}
template <int kPending>
void wgmma_wait() {
  cuda_sim::product_async_wait(kPending);
  cuda_sim::warp_barrier(~0u);  // the products are the warp's: they are done for all its lanes
}

template <class T, int kCount>
void wgmma_hold(T (&)[kCount]) {}

// d = rows b, or d += rows b: `rows` are two of A, as this lane's accumulators have them.
template <Major kMajor, class S>
void multiply_rows(float* d, int accumulators, const float (&rows)[2][16], const SharedOperand& b, bool accumulate) {
  const int t = cuda_sim::lane() % 4;
  for (int i = 0; i < accumulators; i += 4)
    for (int c = 0; c < 2; ++c) {
      float sum[2] = {accumulate ? d[i + c] : 0.f, accumulate ? d[i + 2 + c] : 0.f};
      for (int k = 0; k < 16; ++k) {
        const float v = value_of(element_of<kMajor>(b, k, i * 2 + 2 * t + c), S{});
        sum[0] += rows[0][k] * v, sum[1] += rows[1][k] * v;
      }
      d[i + c] = sum[0], d[i + 2 + c] = sum[1];
    }
}

template <Major kMajor, int kAccumulators, class S>
void wgmma(float (&d)[kAccumulators], const uint32_t (&a)[4], SharedOperand b, bool accumulate, S) {
  struct Operand {
    uint32_t r[4];
  };
  float* const to = d;
  cuda_sim::product_async([to, b, accumulate, mine = Operand{{a[0], a[1], a[2], a[3]}}] {
    cuda_sim::exchange_begin(~0u, &mine, sizeof mine);
    float rows[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) {
        const Operand& owner = *static_cast<const Operand*>(cuda_sim::peer(cuda_sim::lane() / 4 * 4 + k % 8 / 2));
        rows[half][k] = half_of<S>(owner.r[half + k / 8 * 2], k % 2);
      }
    cuda_sim::exchange_end(~0u);
    multiply_rows<kMajor, S>(to, kAccumulators, rows, b, accumulate);
  });
}
template <Major kMajor, int kAccumulators, class S>
void wgmma(float (&d)[kAccumulators], SharedOperand a, SharedOperand b, bool accumulate, S) {
  float* const to = d;
  cuda_sim::product_async([to, a, b, accumulate] {
    const int row = threadIdx.x / 32 % 4 * 16 + cuda_sim::lane() / 4;
    float rows[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) rows[half][k] = value_of(element_of<Major::depth>(a, k, row + half * 8), S{});
    multiply_rows<kMajor, S>(to, kAccumulators, rows, b, accumulate);
  });
}

}  // namespace imagegen::cuda
