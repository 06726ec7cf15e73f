// Tensor cores of sm_90a behind functions: products of a warpgroup (four warps, 128 threads), which go on while the
// threads do other things. The simulator in tests/cuda_sim puts its own file in place of this one. To each warp the
// layouts of A and of the accumulators are those of mma.m16n8k16: warp w of the warpgroup has rows 16w to 16w + 15.
//
//   wgmma_fence();             orders the registers written before with the products issued next
//   wgmma<kMajor>(d, a, b, …); any number of them
//   wgmma_commit();            ends a group
//   wgmma_wait<kPending>();    all but the newest kPending groups are done: d may be read, a and b written over
//   wgmma_hold(d);             before the fence and after the wait, of d and of a in registers: the compiler, which
//                              knows of no products that go on, computes with them on this side of it and not before
//
// They read shared memory through a proxy of their own: who wrote it calls async_proxy_fence() before the barrier.
#pragma once
#include <cstdint>

#include "common/mma.cuh"

// The compilation that has them. A kernel's body stands under it, so that its file compiles for every architecture.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define IMAGEGEN_HAS_WGMMA
#endif

namespace imagegen::cuda {

// How the 16-byte pieces of an operand lie in shared memory. none: squares of 8 x 8, rows of 16 bytes one after
// another. bytes128: eight rows of 128 bytes, piece i of row r at i ^ r, from a multiple of 1024 on.
enum class Swizzle : int { none = 0, bytes128 = 1 };
// Which axis of the operand runs along memory.
enum class Major : int { depth = 0, columns = 1 };

// B, or A, whose columns are then its rows, 16 deep in shared memory. Bytes from one square to the next:
//                       leading            stride
//   none, either        next 8 in depth    next 8 columns
//   bytes128, depth     unused             next 8 columns     (16 further in depth is 32 bytes on)
//   bytes128, columns   next 64 columns    next 8 in depth
struct SharedOperand {
  uint64_t bits;
  // The operand `bytes` further on, a multiple of 16: addresses fit their field, nothing is carried out of it.
  __device__ __forceinline__ SharedOperand plus(int bytes) const { return {bits + (bytes >> 4)}; }
};
__device__ __forceinline__ SharedOperand shared_operand(const void* p, Swizzle swizzle, int leading, int stride) {
  const uint64_t address = __cvta_generic_to_shared(p);
  return {(address & 0x3FFFF) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
          uint64_t(static_cast<int>(swizzle)) << 62};
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void wgmma_hold(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define IMAGEGEN_8(d, i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define IMAGEGEN_16(d, i) IMAGEGEN_8(d, i), IMAGEGEN_8(d, i + 8)
#define IMAGEGEN_32(d, i) IMAGEGEN_16(d, i), IMAGEGEN_16(d, i + 16)
#define IMAGEGEN_40(d, i) IMAGEGEN_32(d, i), IMAGEGEN_8(d, i + 32)
#define IMAGEGEN_64(d, i) IMAGEGEN_32(d, i), IMAGEGEN_32(d, i + 32)
#define IMAGEGEN_PLACES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define IMAGEGEN_PLACES_16 IMAGEGEN_PLACES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define IMAGEGEN_PLACES_32 IMAGEGEN_PLACES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define IMAGEGEN_PLACES_40 IMAGEGEN_PLACES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define IMAGEGEN_PLACES_64 \
  IMAGEGEN_PLACES_40       \
  ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define IMAGEGEN_MULTIPLY(NAME, N, D, ACCUMULATE)                                                                    \
  "{.reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME \
  " {" IMAGEGEN_PLACES_##D "}, "
// A0 to A3 are the places of a; then come b, accumulate and the major axis.
#define IMAGEGEN_WGMMA(S, NAME, N, D, A0, A1, A2, A3, B, ACCUMULATE, MAJOR)                                           \
  template <Major kMajor>                                                                                             \
  __device__ __forceinline__ void wgmma(float (&d)[D], const uint32_t (&a)[4], SharedOperand b, bool accumulate, S) { \
    asm volatile(IMAGEGEN_MULTIPLY(NAME, N, D, ACCUMULATE) "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B              \
                                                           ", p, 1, 1, %" #MAJOR ";}"                                 \
                 : IMAGEGEN_##D(d, 0)                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(static_cast<int>(accumulate)),        \
                   "n"(static_cast<int>(kMajor)));                                                                    \
  }
#define IMAGEGEN_WGMMA_SHARED(S, NAME, N, D, A, B, ACCUMULATE, MAJOR)                                           \
  template <Major kMajor>                                                                                       \
  __device__ __forceinline__ void wgmma(float (&d)[D], SharedOperand a, SharedOperand b, bool accumulate, S) {  \
    asm volatile(IMAGEGEN_MULTIPLY(NAME, N, D, ACCUMULATE) "%" #A ", %" #B ", p, 1, 1, 0, %" #MAJOR ";}"        \
                 : IMAGEGEN_##D(d, 0)                                                                           \
                 : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajor))); \
  }
#define IMAGEGEN_WGMMA_OF(S, NAME)                             \
  IMAGEGEN_WGMMA(S, NAME, 16, 8, 8, 9, 10, 11, 12, 13, 14)     \
  IMAGEGEN_WGMMA(S, NAME, 32, 16, 16, 17, 18, 19, 20, 21, 22)  \
  IMAGEGEN_WGMMA(S, NAME, 64, 32, 32, 33, 34, 35, 36, 37, 38)  \
  IMAGEGEN_WGMMA(S, NAME, 128, 64, 64, 65, 66, 67, 68, 69, 70) \
  IMAGEGEN_WGMMA_SHARED(S, NAME, 80, 40, 40, 41, 42, 43)       \
  IMAGEGEN_WGMMA_SHARED(S, NAME, 128, 64, 64, 65, 66, 67)

// d = a b, or d += a b where `accumulate`: 64 x 16 times 16 x N, N twice the size of d. a: registers, or shared memory
// with its depth along memory.
IMAGEGEN_WGMMA_OF(bf16, "bf16")
IMAGEGEN_WGMMA_OF(fp16, "f16")

#undef IMAGEGEN_WGMMA_OF
#undef IMAGEGEN_WGMMA_SHARED
#undef IMAGEGEN_WGMMA
#undef IMAGEGEN_MULTIPLY
#undef IMAGEGEN_PLACES_64
#undef IMAGEGEN_PLACES_40
#undef IMAGEGEN_PLACES_32
#undef IMAGEGEN_PLACES_16
#undef IMAGEGEN_PLACES_8
#undef IMAGEGEN_64
#undef IMAGEGEN_40
#undef IMAGEGEN_32
#undef IMAGEGEN_16
#undef IMAGEGEN_8

}  // namespace imagegen::cuda
