// c = a b, 64 x kN of depth 128, by a warpgroup, b passing through two stages of shared memory in one of four layouts:
// right where bug is 0, wrong in one way with each other number.
//   1: accumulators read before the products are waited for
//   2: a stage filled again before the products that read it are waited for
#include <exception>
#include <string>

#include "common/launch.cuh"
#include "common/wgmma.cuh"

namespace {

using namespace imagegen;
using namespace imagegen::cuda;

constexpr int kDepth = 128, kStep = 64;  // of b, a stage

// Bytes from the stage's beginning to element (k, n).
template <Swizzle kSwizzle, Major kMajor, int kN>
__device__ int place(int k, int n) {
  if (kSwizzle == Swizzle::none) {
    const int in_square = kMajor == Major::depth ? n % 8 * 16 + k % 8 * 2 : k % 8 * 16 + n % 8 * 2;
    return k / 8 * 128 + n / 8 * (kStep / 8 * 128) + in_square;
  }
  const int row = kMajor == Major::depth ? n : k, column = kMajor == Major::depth ? k : n;
  return column / 64 * (kStep * 128) + row * 128 + (column % 64 / 8 ^ row % 8) * 16 + column % 8 * 2;
}

template <Swizzle kSwizzle, Major kMajor, int kN>
__global__ void product_kernel(const bf16* a, const bf16* b, float* c, int bug) {
  constexpr int kStage = kStep * (kN < 64 ? 64 : kN) * 2;
  char* const shared = dynamic_shared<char>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, t = lane % 4;
  const auto fill = [&](int stage, int k0) {
    for (int i = threadIdx.x; i < kStep * kN; i += 128) {
      const int k = i / kN, n = i % kN;
      *reinterpret_cast<bf16*>(shared + stage * kStage + place<kSwizzle, kMajor, kN>(k, n)) = b[(k0 + k) * kN + n];
    }
    async_proxy_fence();
    __syncthreads();
  };
  const auto pair = [&](int m, int k) { return *reinterpret_cast<const uint32_t*>(a + m * kDepth + k); };
  float sum[kN / 2];
  for (int k0 = 0, stage = 0; k0 < kDepth; k0 += kStep, stage ^= 1) {
    fill(bug == 2 ? 0 : stage, k0);
    constexpr bool plain = kSwizzle == Swizzle::none, deep = kMajor == Major::depth;
    const SharedOperand operand = shared_operand(shared + (bug == 2 ? 0 : stage) * kStage, kSwizzle,
                                                 plain ? 128 : kStep * 128, plain ? kStep / 8 * 128 : 1024);
    wgmma_fence();
    for (int k = 0; k < kStep; k += 16) {
      const uint32_t rows[4] = {pair(row, k0 + k + 2 * t), pair(row + 8, k0 + k + 2 * t), pair(row, k0 + k + 8 + 2 * t),
                                pair(row + 8, k0 + k + 8 + 2 * t)};
      const int further = plain ? k / 8 * 128 : deep ? k * 2 : k * 128;
      wgmma<kMajor>(sum, rows, operand.plus(further), k0 + k > 0, bf16{});
    }
    wgmma_commit();
  }
  if (bug == 1)
    wgmma_wait<1>();
  else
    wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) c[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + t * 2 + i % 2] = sum[i];
}

template <Swizzle kSwizzle, Major kMajor, int kN>
const char* run(const bf16* a, const bf16* b, float* c, int bug) {
  static std::string error;
  try {
    launch(product_kernel<kSwizzle, kMajor, kN>, 1, 128, 2 * kStep * (kN < 64 ? 64 : kN) * 2, nullptr, a, b, c, bug);
    return nullptr;
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
}

template <int kN>
const char* run(const bf16* a, const bf16* b, float* c, int layout, int bug) {
  constexpr Swizzle none = Swizzle::none, bytes128 = Swizzle::bytes128;
  switch (layout) {
    case 0: return run<none, Major::depth, kN>(a, b, c, bug);
    case 1: return run<none, Major::columns, kN>(a, b, c, bug);
    case 2: return run<bytes128, Major::depth, kN>(a, b, c, bug);
    default: return run<bytes128, Major::columns, kN>(a, b, c, bug);
  }
}

}  // namespace

extern "C" const char* product_32(const bf16* a, const bf16* b, float* c, int layout, int bug) {
  return run<32>(a, b, c, layout, bug);
}
extern "C" const char* product_128(const bf16* a, const bf16* b, float* c, int layout, int bug) {
  return run<128>(a, b, c, layout, bug);
}
