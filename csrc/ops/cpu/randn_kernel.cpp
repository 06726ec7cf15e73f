#include "common/parallel.h"
#include "common/philox_simd.h"
#include "ops/randn.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Elements at a time: what one call of `noise` makes stays in L1. A multiple of four vectors.
constexpr int64_t kBlock = 1024;

// Calls body(key, sample's first element in memory, first element within the sample, how many) for every block.
template <class F>
void for_each_block(const RandnParams& p, const F& body) {
  const int64_t blocks = ceil_div(p.size, kBlock);
  parallel_for(p.samples * blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / blocks, first = item % blocks * kBlock;
      const NoiseKey key{p.seed, p.first + static_cast<uint32_t>(sample), p.step, p.stream};
      body(key, sample * p.size, first, min(kBlock, p.size - first));
    }
  });
}

void bits(const RandnParams& p) {
  for_each_block(p, [&](const NoiseKey& key, int64_t origin, int64_t first, int64_t n) {
    uint32_t block[kBlock];
    noise(key, first, n, block);
    std::memcpy(static_cast<uint32_t*>(p.out) + origin + first, block, n * sizeof(uint32_t));
  });
}

template <class S>
void normals(const RandnParams& p) {
  for_each_block(p, [&](const NoiseKey& key, int64_t origin, int64_t first, int64_t n) {
    alignas(64) float block[kBlock];
    noise(key, first, n, block);
    S* out = static_cast<S*>(p.out) + origin + first;
    if constexpr (sizeof(S) == sizeof(double))
      for (int64_t i = 0; i < n; ++i) out[i] = block[i];
    else
      for (int64_t i = 0; i < n; i += kLanes<float>) store(out + i, load(block + i), n - i);
  });
}

}  // namespace

void randn_kernel(const RandnParams& p) {
  if (p.bits) return bits(p);
  dispatch_dtype(p.dtype, [&]<class S>() { normals<S>(p); });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
