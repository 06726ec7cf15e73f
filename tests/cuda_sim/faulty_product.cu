// c = a b^T on tensor cores, two tiles of K in flight: right where bug is 0, wrong in one way with each other number.
//   1: no barrier between the copies' end and their use     2: a stage filled again before everyone has read it
//   3: one group of copies too few waited for                4: a store past the end of c
//   5: shared memory read past its end                       6: an operand of mma not rounded to tf32
#include <exception>
#include <string>

#include "common/copy_async.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

namespace {

using namespace imagegen;
using namespace imagegen::cuda;

template <class S>
struct Traits {
  static constexpr int kM = 32, kN = 64, kK = 32;  // of a block: its two warps take 16 rows each
  static constexpr int kThreads = 64;
  static constexpr int kRow = kK + 16 / sizeof(S);  // padded: eight rows lie in different banks
  static constexpr int kStage = (kM + kN) * kRow;
  static_assert(kRow * sizeof(S) % 16 == 0, "rows begin where 16-byte copies may");
};

template <class S>
__device__ void multiply(float (&c)[8][4], const S* a, const S* b, int) {
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < Traits<S>::kK; k += 16) {
    uint32_t fa[4];
    load_matrices(fa, a + lane % 16 * Traits<S>::kRow + k + lane / 16 * 8);
    for (int j = 0; j < 8; j += 2) {
      uint32_t fb[4];
      load_matrices(fb, b + (j * 8 + lane / 16 * 8 + lane % 8) * Traits<S>::kRow + k + lane / 8 % 2 * 8);
      mma(c[j], fa, fb[0], fb[1], S{});
      mma(c[j + 1], fa, fb[2], fb[3], S{});
    }
  }
}
__device__ void multiply(float (&c)[8][4], const float* a, const float* b, int bug) {
  constexpr int row = Traits<float>::kRow;
  const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto bits = [&](float x) { return bug == 6 ? reinterpret_cast<const uint32_t&>(x) : to_tf32(x); };
  for (int k = t; k < Traits<float>::kK; k += 8) {
    const float* p = a + group * row + k;
    const uint32_t fa[4] = {bits(p[0]), bits(p[8 * row]), bits(p[4]), bits(p[8 * row + 4])};
    for (int j = 0; j < 8; ++j) {
      const float* q = b + (j * 8 + group) * row + k;
      mma(c[j], fa, bits(q[0]), bits(q[4]), float{});
    }
  }
}

template <class S>
__global__ void product_kernel(const S* a, const S* b, float* c, int depth, int bug) {
  using T = Traits<S>;
  S* shared = dynamic_shared<S>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto fill = [&](int stage, int k0) {
    constexpr int per_copy = 16 / sizeof(S), per_row = T::kK / per_copy;
    for (int i = threadIdx.x; i < (T::kM + T::kN) * per_row; i += T::kThreads) {
      const int r = i / per_row, k = i % per_row * per_copy;
      const S* from = r < T::kM ? a + r * depth : b + (r - T::kM) * depth;
      copy_async(shared + stage * T::kStage + r * T::kRow + k, from + k0 + k, true);
    }
    copy_async_commit();
  };
  float sum[8][4] = {};
  fill(0, 0);
  for (int k0 = 0, stage = 0; k0 < depth; k0 += T::kK, stage ^= 1) {
    if (k0 + T::kK < depth) {
      fill(stage ^ 1, k0 + T::kK);
      if (bug == 3)
        copy_async_wait<2>();
      else
        copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    if (bug != 1) __syncthreads();
    const S* tile = shared + stage * T::kStage;
    multiply(sum, tile + warp * 16 * T::kRow, tile + T::kM * T::kRow, bug);
    if (bug != 2) __syncthreads();
  }
  if (bug == 5) sum[0][0] += static_cast<float>(reinterpret_cast<const unsigned char*>(shared + 2 * T::kStage)[0]);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int m = warp * 16 + lane / 4 + i / 2 * 8, n = j * 8 + lane % 4 * 2 + i % 2;
      c[m * T::kN + n + (bug == 4)] = sum[j][i];
    }
}

template <class S>
const char* run(const S* a, const S* b, float* c, int depth, int bug) {
  static std::string error;
  try {
    launch(product_kernel<S>, 1, Traits<S>::kThreads, 2 * Traits<S>::kStage * sizeof(S), nullptr, a, b, c, depth, bug);
    return nullptr;
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
}

}  // namespace

extern "C" const char* product_float(const float* a, const float* b, float* c, int depth, int bug) {
  return run(a, b, c, depth, bug);
}
extern "C" const char* product_bf16(const bf16* a, const bf16* b, float* c, int depth, int bug) {
  return run(a, b, c, depth, bug);
}
extern "C" const char* product_fp16(const fp16* a, const fp16* b, float* c, int depth, int bug) {
  return run(a, b, c, depth, bug);
}
