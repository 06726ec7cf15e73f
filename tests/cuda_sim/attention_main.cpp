// attention's CUDA kernels as a program for the sanitizers: arguments are the dtype, D and, for sm_90a's forward,
// "sm90"; else it runs forward and backward.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ops/attention.h"

namespace imagegen::cuda {
cudaError_t attention_kernel(const AttentionParams&, cudaStream_t);
cudaError_t attention_sm90_kernel(const AttentionParams&, cudaStream_t);
cudaError_t attention_backward_kernel(const AttentionParams&, cudaStream_t);
}  // namespace imagegen::cuda

int main(int count, char** arguments) {
  using namespace imagegen;
  const bool half = std::string(arguments[1]) == "bf16";
  const int64_t D = std::atoi(arguments[2]), B = 1, H = 2, Hk = 1, Lq = 37, Lk = 77, size = half ? 2 : 4;
  const auto ones = [&](int64_t n) {
    std::vector<unsigned char> bytes(n * size);
    for (int64_t i = 0; i < n * size; i += size) bytes[i + size - 1] = 0x3F, bytes[i + size - 2] = 0x80;
    return bytes;
  };
  auto q = ones(B * H * Lq * D), k = ones(B * Hk * Lk * D), v = k, out = q, grad = q, dq = q, dk = k, dv = k;
  std::vector<float> lse(B * H * Lq), delta(lse.size()), mask(Lk), dmask(Lk);

  AttentionParams p{};
  p.q = {q.data(), H * Lq * D, Lq * D, D};
  p.k = {k.data(), Hk * Lk * D, Lk * D, D};
  p.v = {v.data(), Hk * Lk * D, Lk * D, D};
  p.mask = {AttentionMaskKind::additive, mask.data(), Dtype::f32, 0, 0, 0, 1};
  p.out = {out.data(), H * Lq * D, Lq * D, D};
  p.lse = lse.data();
  p.grad = {grad.data(), H * Lq * D, Lq * D, D};
  p.dq = {dq.data(), H * Lq * D, Lq * D, D};
  p.dk = {dk.data(), Hk * Lk * D, Lk * D, D};
  p.dv = {dv.data(), Hk * Lk * D, Lk * D, D};
  p.dmask = dmask.data();
  p.mask_size[0] = p.mask_size[1] = p.mask_size[2] = 1, p.mask_size[3] = Lk;
  p.delta = delta.data();
  p.dtype = half ? Dtype::bf16 : Dtype::f32;
  p.causal = true, p.scale = 0.1;
  p.batch = B, p.heads = H, p.kv_heads = Hk, p.q_len = Lq, p.k_len = Lk, p.head_dim = D, p.multiprocessors = 4;
  const bool sm90 = count > 3;
  const bool ran = sm90 ? cuda::attention_sm90_kernel(p, nullptr) == cudaSuccess
                        : cuda::attention_kernel(p, nullptr) == cudaSuccess &&
                              cuda::attention_backward_kernel(p, nullptr) == cudaSuccess;
  std::puts(ran ? "ran" : "failed");
}
