#include "common/parallel.h"
#include "common/simd.h"
#include "ops/bias_act.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Innermost rows are cut into pieces of this many elements, so that one long row still feeds every thread.
constexpr int64_t kPiece = 8192;

template <class S>
INLINE Vec<Compute<S>> load_strided(const S* p, int64_t stride, int64_t n) {
  if (stride == 1) return load(p, n);
  S part[kLanes<Compute<S>>] = {};
  for (int64_t i = 0; i < min<int64_t>(n, kLanes<Compute<S>>); ++i) part[i] = p[i * stride];
  return load(part);
}

template <class S>
INLINE void store_strided(S* p, int64_t stride, Vec<Compute<S>> v, int64_t n) {
  if (stride == 1) return store(p, v, n);
  S part[kLanes<Compute<S>>];
  store(part, v);
  for (int64_t i = 0; i < min<int64_t>(n, kLanes<Compute<S>>); ++i) p[i * stride] = part[i];
}

// y = clamp(gain * act(z)), or grad times its derivative, over n elements of the innermost axis.
template <Activation A, bool kBackward, class S>
INLINE void row(const BiasActParams& p, const S* x, const S* b, const S* grad, S* y, int64_t n) {
  using T = Compute<S>;
  const int d = p.dims - 1;
  const T alpha = T(p.alpha), gain = T(p.gain), clamp = T(p.clamp);
  const Vec<T> row_bias = broadcast(b && p.b_stride[d] == 0 ? to_compute(*b) : T(0));
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t rest = n - i;
    Vec<T> z = load_strided(x + i * p.x_stride[d], p.x_stride[d], rest) + row_bias;
    if (b && p.b_stride[d] != 0) z += load_strided(b + i * p.b_stride[d], p.b_stride[d], rest);
    Vec<T> v = activate<A, T>(z, alpha) * gain;
    if constexpr (kBackward) {
      const Vec<T> g = load_strided(grad + i * p.grad_stride[d], p.grad_stride[d], rest);
      const Vec<T> dz = g * (activate_derivative<A, T>(z, alpha) * gain);
      v = select<T>(abs<T>(v) > clamp, Vec<T>{}, dz);
    } else {
      v = select<T>(v > clamp, broadcast(clamp), select<T>(v < -clamp, broadcast(-clamp), v));
    }
    store_strided(y + i * p.y_stride[d], p.y_stride[d], v, rest);
  }
}

template <Activation A, bool kBackward, class S>
void run(const BiasActParams& p) {
  const int inner = p.dims - 1;
  const int64_t length = p.size[inner], pieces = ceil_div(length, kPiece);
  int64_t rows = 1;
  for (int d = 0; d < inner; ++d) rows *= p.size[d];
  const int64_t grain = max<int64_t>(1, kPiece / min(length, kPiece));
  parallel_for(rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % pieces * kPiece, n = min(kPiece, length - first);
      int64_t rest = item / pieces;
      int64_t x = first * p.x_stride[inner], b = first * p.b_stride[inner], y = first * p.y_stride[inner];
      int64_t grad = first * p.grad_stride[inner];
      for (int d = inner - 1; d >= 0; --d) {
        const int64_t i = rest % p.size[d];
        rest /= p.size[d];
        x += i * p.x_stride[d], b += i * p.b_stride[d], y += i * p.y_stride[d], grad += i * p.grad_stride[d];
      }
      row<A, kBackward>(p, static_cast<const S*>(p.x) + x, p.b ? static_cast<const S*>(p.b) + b : nullptr,
                        kBackward ? static_cast<const S*>(p.grad) + grad : nullptr, static_cast<S*>(p.y) + y, n);
    }
  });
}

}  // namespace

void bias_act_kernel(const BiasActParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    dispatch_activation(p.act, [&]<Activation A>() { p.grad ? run<A, true, S>(p) : run<A, false, S>(p); });
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
