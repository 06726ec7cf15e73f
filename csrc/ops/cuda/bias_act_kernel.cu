// bias_act on CUDA: one pass over memory. Predicted, not measured, on an H200 at 4.3 TB/s: (1, 512, 256, 256) bf16 and
// a bias 31 us forward and 47 backward, of 67 MB that are read (backward two of them) and as many that are written.
#include "common/ceil_div.h"
#include "common/launch.cuh"
#include "common/scalar.cuh"
#include "ops/bias_act.h"
#include "ops/bias_act_point.h"

namespace imagegen::cuda {
namespace {

constexpr int kThreads = 256;

template <class S>
struct Traits {
  using T = Compute<S>;  // the constants are rounded to it on the host
  struct Constants {
    T alpha, gain, clamp;
  };
  static constexpr int kPack = kPackSize<S>;
  static_assert(kPack * sizeof(S) == 16, "a thread moves 16 bytes at a time");
};

// All tensors dense in the same order, each thread 16 bytes of them: [..., channels, inner] in memory.
template <Activation A, bool kBackward, class S>
__global__ void __launch_bounds__(kThreads)
    dense_kernel(const S* __restrict__ x, const S* __restrict__ b, const S* __restrict__ grad, S* __restrict__ y,
                 int64_t size, int64_t channels, int64_t inner, int64_t b_stride, typename Traits<S>::Constants k) {
  using T = Compute<S>;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * Traits<S>::kPack, n = size - first;
  if (n <= 0) return;
  Pack<S> v = load(x + first, n), g{};
  if constexpr (kBackward) g = load(grad + first, n);

  // The division is paid once, and not without a bias; from element to element the channel moves on by counting.
  int64_t channel = 0, step = 0;
  T bias = 0;
  if (b) {
    const int64_t run = first / inner;
    channel = run % channels, step = first - run * inner;
    bias = to_compute(b[channel * b_stride]);
  }
#pragma unroll
  for (int i = 0; i < Traits<S>::kPack; ++i) {
    const T z = to_compute(v.at[i]) + bias;
    v.at[i] = from_compute<S>(bias_act_point<A, kBackward, T>(z, to_compute(g.at[i]), k.alpha, k.gain, k.clamp));
    if (b && ++step == inner) {
      step = 0;
      if (++channel == channels) channel = 0;
      bias = to_compute(b[channel * b_stride]);
    }
  }
  store(y + first, v, n);
}

// Any strides, each thread one element.
template <Activation A, bool kBackward, class S>
__global__ void __launch_bounds__(kThreads)
    strided_kernel(BiasActParams p, int64_t size, typename Traits<S>::Constants k) {
  using T = Compute<S>;
  int64_t rest = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (rest >= size) return;
  int64_t x = 0, b = 0, grad = 0, y = 0;
  for (int d = p.dims - 1; d >= 0; --d) {
    const int64_t i = rest % p.size[d];
    rest /= p.size[d];
    x += i * p.x_stride[d], b += i * p.b_stride[d], grad += i * p.grad_stride[d], y += i * p.y_stride[d];
  }
  const T bias = p.b ? to_compute(static_cast<const S*>(p.b)[b]) : T(0);
  const T z = to_compute(static_cast<const S*>(p.x)[x]) + bias;
  const T g = kBackward ? to_compute(static_cast<const S*>(p.grad)[grad]) : T(0);
  static_cast<S*>(p.y)[y] = from_compute<S>(bias_act_point<A, kBackward, T>(z, g, k.alpha, k.gain, k.clamp));
}

bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

bool dense(const BiasActParams& p) {
  int64_t stride = 1;
  for (int d = p.dims - 1; d >= 0; --d) {
    if (p.y_stride[d] != stride || p.x_stride[d] != stride || (p.grad && p.grad_stride[d] != stride)) return false;
    stride *= p.size[d];
  }
  return aligned(p.x) && aligned(p.y) && aligned(p.grad);
}

template <Activation A, bool kBackward, class S>
cudaError_t run(const BiasActParams& p, cudaStream_t stream) {
  using T = Compute<S>;
  const typename Traits<S>::Constants constants{T(p.alpha), T(p.gain), T(p.clamp)};
  int64_t size = 1;
  for (int d = 0; d < p.dims; ++d) size *= p.size[d];
  const auto blocks = [&](int64_t per_thread) {
    return dim3(static_cast<unsigned>(ceil_div(size, per_thread * kThreads)));
  };
  if (!dense(p)) return launch(strided_kernel<A, kBackward, S>, blocks(1), kThreads, 0, stream, p, size, constants);
  int axis = p.dims - 1;  // the bias's
  for (int d = 0; d < p.dims; ++d)
    if (p.b_stride[d] != 0) axis = d;
  return launch(dense_kernel<A, kBackward, S>, blocks(Traits<S>::kPack), kThreads, 0, stream,
                static_cast<const S*>(p.x), static_cast<const S*>(p.b), static_cast<const S*>(p.grad),
                static_cast<S*>(p.y), size, p.size[axis], p.y_stride[axis], p.b_stride[axis], constants);
}

}  // namespace

cudaError_t bias_act_kernel(const BiasActParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&]<class S>() {
    return dispatch_activation(
        p.act, [&]<Activation A>() { return p.grad ? run<A, true, S>(p, stream) : run<A, false, S>(p, stream); });
  });
}

}  // namespace imagegen::cuda
