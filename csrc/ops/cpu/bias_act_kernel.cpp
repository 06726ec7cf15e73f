#include "common/parallel.h"
#include "common/simd.h"
#include "ops/bias_act.h"
#include "ops/bias_act_point.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Innermost rows are cut into pieces of this many elements, so that one long row still feeds every thread.
constexpr int64_t kPiece = 8192;

// A bias along short rows is repeated up to this length: rows of three channels would fill no vector (12x slower).
constexpr int64_t kRepeated = 1024;

template <class S>
INLINE Vec<Compute<S>> load_strided(const S* p, int64_t stride, int64_t n) {
  if (stride == 1) return load(p, n);
  if (stride == 0) return broadcast(to_compute(*p));
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

// n elements of the innermost axis.
template <Activation A, bool kBackward, class S>
INLINE void row(const BiasActParams& p, const S* x, const S* b, const S* grad, S* y, int64_t n) {
  using T = Compute<S>;
  const int d = p.dims - 1;
  const T alpha = T(p.alpha), gain = T(p.gain), clamp = T(p.clamp);
  const Vec<T> row_bias = broadcast(b && p.b_stride[d] == 0 ? to_compute(*b) : T(0));
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t rest = n - i;
    Vec<T> z = load_strided(x + i * p.x_stride[d], p.x_stride[d], rest) + row_bias, g{};
    if (b && p.b_stride[d] != 0) z += load_strided(b + i * p.b_stride[d], p.b_stride[d], rest);
    if constexpr (kBackward) g = load_strided(grad + i * p.grad_stride[d], p.grad_stride[d], rest);
    store_strided(y + i * p.y_stride[d], p.y_stride[d], bias_act_point<A, kBackward, T>(z, g, alpha, gain, clamp),
                  rest);
  }
}

// Makes one axis of the two innermost ones where only the bias tells them apart, and repeats the bias along it.
// Returns the length of the repeated bias, or 0 where nothing was done.
template <class S>
int64_t repeat_bias(BiasActParams& p, S* repeated) {
  const int inner = p.dims - 1, outer = inner - 1;
  const int64_t n = p.size[inner];
  if (!p.b || p.b_stride[inner] == 0 || outer < 0 || n > kRepeated / 2) return 0;
  if (p.x_stride[outer] != n * p.x_stride[inner] || p.y_stride[outer] != n * p.y_stride[inner] ||
      p.grad_stride[outer] != n * p.grad_stride[inner])
    return 0;
  const int64_t length = min(kRepeated / n, p.size[outer]) * n;
  for (int64_t i = 0; i < length; ++i) repeated[i] = static_cast<const S*>(p.b)[i % n * p.b_stride[inner]];
  p.b = repeated;
  p.dims = inner;
  p.size[outer] *= n;
  p.x_stride[outer] = p.x_stride[inner], p.y_stride[outer] = p.y_stride[inner];
  p.grad_stride[outer] = p.grad_stride[inner], p.b_stride[outer] = 1;
  return length;
}

template <Activation A, bool kBackward, class S>
void run(BiasActParams p) {
  S repeated[kRepeated];
  const int64_t repeated_length = repeat_bias(p, repeated);
  const int inner = p.dims - 1;
  const int64_t piece = repeated_length ? repeated_length : kPiece;
  const int64_t length = p.size[inner], pieces = ceil_div(length, piece);
  int64_t rows = 1;
  for (int d = 0; d < inner; ++d) rows *= p.size[d];
  const int64_t grain = max<int64_t>(1, kPiece / min(length, piece));
  parallel_for(rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % pieces * piece, n = min(piece, length - first);
      int64_t rest = item / pieces;
      int64_t x = first * p.x_stride[inner], y = first * p.y_stride[inner], grad = first * p.grad_stride[inner];
      int64_t b = repeated_length ? 0 : first * p.b_stride[inner];
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
