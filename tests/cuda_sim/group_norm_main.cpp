// group_norm's CUDA kernels as a program for the sanitizers: arguments are the dtype and the layout, and where given,
// that large shapes, which ThreadSanitizer would take minutes for, are left out.
#include <cuda_runtime.h>

#include <cstdio>
#include <string>
#include <vector>

#include "ops/group_norm.h"

namespace imagegen::cuda {
int64_t group_norm_workspace_bytes(const GroupNormParams&);
cudaError_t group_norm_kernel(const GroupNormParams&, void* workspace, cudaStream_t);
}  // namespace imagegen::cuda

namespace {

using namespace imagegen;

bool run(Dtype dtype, bool innermost, int64_t batch, int64_t channels, int64_t groups, int64_t pixels) {
  const int64_t size = dtype == Dtype::f32 ? 4 : 2, n = batch * channels * pixels;
  std::vector<unsigned char> x(n * size), grad(x), y(x);
  for (int64_t i = 0; i < n; ++i) x[(i + 1) * size - 1] = 0x3F, grad[(i + 1) * size - 1] = i % 3 ? 0x3F : 0xBF;
  std::vector<float> mean(batch * groups), rstd(mean), scale(batch * channels), sum(scale), sum_xhat(scale),
      weight(channels);

  GroupNormParams p{};
  p.x = x.data(), p.y = y.data(), p.mean = mean.data(), p.rstd = rstd.data();
  p.sum_dz = sum.data(), p.sum_dz_xhat = sum_xhat.data();
  p.weight = {weight.data(), Dtype::f32, 0, 1};
  p.scale = {scale.data(), Dtype::f32, channels, 1};
  p.dtype = dtype, p.activation = Activation::silu, p.eps = 1e-5;
  p.channels_innermost = innermost;
  p.batch = batch, p.channels = channels, p.groups = groups, p.pixels = pixels;
  p.x_batch_stride = p.grad_batch_stride = channels * pixels;
  p.x_c_stride = p.grad_c_stride = innermost ? 1 : pixels;
  p.dims = 1, p.size[0] = pixels, p.x_stride[0] = p.grad_stride[0] = innermost ? channels : 1;
  for (const bool backward : {false, true}) {
    p.backward = backward;
    if (backward) p.grad = grad.data();
    std::vector<unsigned char> workspace(cuda::group_norm_workspace_bytes(p));
    if (cuda::group_norm_kernel(p, workspace.data(), nullptr) != cudaSuccess) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const Dtype dtype = std::string(arguments[1]) == "bf16" ? Dtype::bf16 : Dtype::f32;
  const bool innermost = std::string(arguments[2]) == "innermost";
  const bool small = count > 3;
  // A group in shared memory, planes of several slices, planes of odd sizes; spans with a rest.
  const bool ran = run(dtype, innermost, 2, 16, 4, 64) && (small || run(dtype, innermost, 1, 2, 1, 16512)) &&
                   run(dtype, innermost, 2, 6, 3, 35) && (small || run(dtype, innermost, 1, 80, 8, 72));
  std::puts(ran ? "ran" : "failed");
}
