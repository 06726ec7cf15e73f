#include "common/launch.cuh"
#include "common/scalar.cuh"
// after scalar.cuh, whose INLINE it takes
#include "common/philox.h"
#include "ops/randn.h"

namespace imagegen::cuda {
namespace {

constexpr int kThreads = 256;

// A thread takes one counter: four elements of one sample.
template <bool kBits, class S>
__global__ void __launch_bounds__(kThreads) counter_kernel(RandnParams p, int64_t blocks) {
  const int64_t sample = blockIdx.x / blocks;
  const int64_t counter = blockIdx.x % blocks * kThreads + threadIdx.x, first = counter * 4;
  if (first >= p.size) return;
  const NoiseKey key{p.seed, p.first + static_cast<uint32_t>(sample), p.step, p.stream};
  const auto [x, y, z, w] =
      noise_words<uint32_t>(key, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32));
  S v[4];
  if constexpr (kBits) {
    v[0] = x, v[1] = y, v[2] = z, v[3] = w;
  } else {
    float normal[4];
    box_muller<uint32_t>(x, y, normal[0], normal[1]);
    box_muller<uint32_t>(z, w, normal[2], normal[3]);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = from_compute<S>(static_cast<Compute<S>>(normal[j]));
  }
  S* out = static_cast<S*>(p.out) + sample * p.size + first;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (first + j < p.size) out[j] = v[j];
}

template <bool kBits, class S>
cudaError_t run(const RandnParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.size + 4 * kThreads - 1) / (4 * kThreads);
  return launch(counter_kernel<kBits, S>, dim3(static_cast<unsigned>(p.samples * blocks)), kThreads, 0, stream, p,
                blocks);
}

}  // namespace

cudaError_t randn_kernel(const RandnParams& p, cudaStream_t stream) {
  if (p.bits) return run<true, uint32_t>(p, stream);
  return dispatch_dtype(p.dtype, [&]<class S>() { return run<false, S>(p, stream); });
}

}  // namespace imagegen::cuda
