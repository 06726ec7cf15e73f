// What group_norm's kernels share: coefficients, sums and the two sweeps over memory.
#pragma once
#include "common/memory.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "ops/group_norm.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

constexpr int64_t kSample = 16;    // one element in so many gives the pivot of a piece
constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// Outputs from this size on are stored past the caches: through them an output costs its own memory's traffic again. At
// 4 MB, out of memory, that saves a fifth of the time on one thread and a tenth on two; half of it where the next layer
// then reads the output.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

// How far ahead of what is summed its neighbours are asked for, in elements. The hardware does not look past a page,
// nor follow sums that hop from pixel to pixel: without, the backward takes 1.1 to 1.4x from memory.
constexpr int64_t kAheadOfSums = 4096;

// Mean and centred sum of squares of n elements.
struct Moments {
  double n, mean, m2;
};

// Sums of dz and of dz * (x - mean).
struct GradientSums {
  double dz, dz_d;
};

// From sums of (x - pivot) and its square. The pivot is the mean of a sixteenth or more of the elements, so the
// subtraction loses at most four bits even where |mean| is far above the deviation.
INLINE Moments about(double pivot, double n, double sum, double square) {
  return {n, pivot + sum / n, max(0.0, square - sum * sum / n)};
}

// The moments of all elements together (Chan et al. 1979, for many parts at once).
template <class F>
INLINE Moments combine(int64_t count, const F& part) {
  double n = 0, total = 0, m2 = 0;
  for (int64_t i = 0; i < count; ++i) n += part(i).n, total += part(i).n * part(i).mean;
  const double mean = n > 0 ? total / n : 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = part(i).mean - mean;
    m2 += part(i).m2 + part(i).n * d * d;
  }
  return {n, mean, m2};
}

INLINE double read(const GroupNormFactor& f, int64_t b, int64_t c, double absent) {
  if (!f.p) return absent;
  const int64_t i = b * f.batch_stride + c * f.c_stride;
  switch (f.dtype) {
    case Dtype::f32: return static_cast<const float*>(f.p)[i];
    case Dtype::f64: return static_cast<const double*>(f.p)[i];
    case Dtype::bf16: return to_compute(static_cast<const bf16*>(f.p)[i]);
    default: return to_compute(static_cast<const fp16*>(f.p)[i]);
  }
}

// Per image and channel: z = (x - center) * gain + offset is the argument of the activation, and
// dx = dz * gain - (x - center) * slope - level. The subtraction comes first: folded into the offset it would cancel
// where |mean| is far above the deviation.
template <class T>
struct Coefficients {
  T *center, *gain, *offset, *slope, *level;  // [B, padded C]
};
template <class T>
struct ChannelCoefficients {
  Vec<T> center, gain, offset, slope, level;
};

// Loops are compiled for no activation and for SiLU, which follow normalisations. Any other costs a call a vector, and
// a third of the time to compile.
constexpr Activation kAnother = static_cast<Activation>(-1);

template <class F>
INLINE void dispatch_usual(Activation activation, const F& f) {
  switch (activation) {
    case Activation::linear: return f.template operator()<Activation::linear>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    default: return f.template operator()<kAnother>();
  }
}

template <class T>
NOINLINE Vec<T> activate_any(Activation activation, Vec<T> z) {
  return dispatch_activation(activation, [&]<Activation A>() { return activate<A, T>(z); });
}
template <class T>
NOINLINE Vec<T> activate_derivative_any(Activation activation, Vec<T> z) {
  return dispatch_activation(activation, [&]<Activation A>() { return activate_derivative<A, T>(z); });
}

template <Activation A, class T>
INLINE Vec<T> normalise(Vec<T> x, const ChannelCoefficients<T>& k, Activation activation) {
  const Vec<T> z = (x - k.center) * k.gain + k.offset;
  if constexpr (A == kAnother)
    return activate_any<T>(activation, z);
  else
    return activate<A, T>(z);
}
// dz, for d = x - center.
template <Activation A, class T>
INLINE Vec<T> before_activation(Vec<T> d, Vec<T> g, const ChannelCoefficients<T>& k, Activation activation) {
  const Vec<T> z = d * k.gain + k.offset;
  if constexpr (A == kAnother)
    return g * activate_derivative_any<T>(activation, z);
  else
    return g * activate_derivative<A, T>(z);
}
template <Activation A, class T>
INLINE Vec<T> gradient(Vec<T> x, Vec<T> g, const ChannelCoefficients<T>& k, Activation activation) {
  const Vec<T> d = x - k.center, dz = before_activation<A, T>(d, g, k, activation);
  return dz * k.gain - (d * k.slope + k.level);
}

// Stores a vector, past the caches where kStream; then p is a multiple of what is stored.
template <bool kStream, class S>
INLINE void put(S* p, Vec<Compute<S>> v) {
  if constexpr (!kStream)
    return store(p, v);
  else if constexpr (sizeof(S) == sizeof(Compute<S>))
    return stream(p, v);
#if defined(__AVX2__)
  alignas(32) S part[kLanes<Compute<S>>];
  store(part, v);
  [[maybe_unused]] void *to = p, *from = part;
  if constexpr (sizeof(part) == 32)
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_load_si256(static_cast<__m256i*>(from)));
  else if constexpr (sizeof(part) == 16)
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_load_si128(static_cast<__m128i*>(from)));
#else
  store(p, v);
#endif
}

// The activation is chosen within a piece: outside, the threads' code would be built for each.
//
// Runs first over every piece of every unit, finish once per unit, then second over every piece. A thread that has
// whole units does each of them to its end while it is in cache. The second sweep goes backwards: what the first read
// last is still there. Where kOverlap, a thread instead reads the next unit, piece by piece, while it writes this one,
// both forwards: loads from memory then overlap arithmetic and stores. second is told whether the thread has a next
// unit; first and second, which thread has the unit to itself, or kShared.
constexpr int64_t kShared = -1;

template <bool kOverlap, class First, class Finish, class Second>
INLINE void two_sweeps(int64_t units, int64_t pieces, int64_t unit_elements, const First& first, const Finish& finish,
                       const Second& second) {
  const int64_t grain = ceil_div(kGrain, max<int64_t>(unit_elements, 1)), threads = num_threads();
  if (units % threads == 0 || units >= 8 * threads || units * unit_elements <= kGrain) {
    int64_t arrived = 0;
    parallel_for(units, grain, [&](int64_t begin, int64_t end) {
      const int64_t thread = __atomic_fetch_add(&arrived, 1, __ATOMIC_RELAXED);
      for (int64_t unit = begin; unit < end; ++unit) {
        const bool goes_on = unit + 1 < end;
        if (!kOverlap || unit == begin)
          for (int64_t i = 0; i < pieces; ++i) first(unit, i, thread);
        finish(unit);
        for (int64_t i = 0; i < pieces; ++i) {
          const int64_t piece = kOverlap ? i : pieces - 1 - i;
          second(unit, piece, thread, goes_on);
          if (kOverlap && goes_on) first(unit + 1, piece, thread);
        }
      }
      finish_streams();
    });
    return;
  }
  const int64_t piece_grain = ceil_div(kGrain * pieces, max<int64_t>(unit_elements, 1));
  parallel_for(units * pieces, piece_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) first(i / pieces, i % pieces, kShared);
  });
  parallel_for(units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) finish(unit);
  });
  parallel_for(units * pieces, piece_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) second(i / pieces, i % pieces, kShared, false);
    finish_streams();
  });
}

template <class S>
struct GroupNorm {
  using T = Compute<S>;
  static constexpr int L = kLanes<T>;

  const GroupNormParams& p;
  const int64_t group_channels = p.channels / p.groups;
  const double group_elements = double(group_channels) * double(p.pixels);
  const int64_t padded = round_up(p.channels, L);
  Coefficients<T> k{};

  const S* x_at(int64_t b, int64_t c) const {
    return static_cast<const S*>(p.x) + b * p.x_batch_stride + c * p.x_c_stride;
  }
  const S* grad_at(int64_t b, int64_t c) const {
    return static_cast<const S*>(p.grad) + b * p.grad_batch_stride + c * p.grad_c_stride;
  }

  S* y_at(int64_t b, int64_t c) const {  // planar
    return static_cast<S*>(p.y) + (b * p.channels + c) * p.pixels;
  }

  // Whether y goes past the caches: it is large, and every vector of it lies at a multiple of its size.
  bool streams(int64_t run) const {
    const int64_t bytes = p.batch * p.channels * p.pixels * sizeof(S);
    return bytes >= kStreamedBytes && run % L == 0 && reinterpret_cast<uintptr_t>(p.y) % (sizeof(S) * L) == 0;
  }

  // Scratch memory: the coefficients, `parts` of what is summed in double precision and `sums` more numbers.
  template <class Part>
  void allocate(int64_t parts, int64_t sums, Part** parts_out, T** sums_out) {
    const int64_t n = p.batch * padded;
    char* memory = static_cast<char*>(workspace(parts * sizeof(Part) + (5 * n + sums) * sizeof(T)));
    T* numbers = static_cast<T*>(static_cast<void*>(memory + parts * sizeof(Part)));
    k = {numbers, numbers + n, numbers + 2 * n, numbers + 3 * n, numbers + 4 * n};
    *sums_out = numbers + 5 * n;
    *parts_out = static_cast<Part*>(static_cast<void*>(memory));
  }

  // (xhat * weight + bias) * (1 + scale) + shift = xhat * gain + offset
  struct Affine {
    double gain, offset;
  };
  Affine affine(int64_t b, int64_t c) const {
    const double weight = read(p.weight, b, c, 1), bias = read(p.bias, b, c, 0);
    const double scale = 1 + read(p.scale, b, c, 0), shift = read(p.shift, b, c, 0);
    return {weight * scale, bias * scale + shift};
  }

  // Of a group, as the caller knows them.
  Moments known_moments(int64_t b, int64_t g) const {
    const T* const m = static_cast<const T*>(p.moments) + 2 * (b * p.groups + g);
    return {1, m[0], m[1]};
  }

  void finish_forward(int64_t b, int64_t g, const Moments& m) const {
    const double rstd = 1 / __builtin_sqrt((m.n > 0 ? m.m2 / m.n : 0) + p.eps);
    const T center = T(m.mean);
    static_cast<T*>(p.mean)[b * p.groups + g] = center;
    static_cast<T*>(p.rstd)[b * p.groups + g] = T(rstd);
    for (int64_t c = g * group_channels; c < (g + 1) * group_channels; ++c) {
      const Affine f = affine(b, c);
      const int64_t i = b * padded + c;
      k.center[i] = center;
      k.gain[i] = T(f.gain * rstd);
      k.offset[i] = T(f.offset - (m.mean - center) * f.gain * rstd);  // with what rounding the mean to T lost
      if (!p.gain) continue;
      static_cast<T*>(p.gain)[b * p.channels + c] = k.gain[i];
      static_cast<T*>(p.offset)[b * p.channels + c] = T(f.offset - m.mean * f.gain * rstd);
    }
  }

  void start_backward() const {
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t c = 0; c < p.channels; ++c) {
        const Affine f = affine(b, c);
        const int64_t i = b * padded + c, statistic = b * p.groups + c / group_channels;
        k.center[i] = static_cast<const T*>(p.mean)[statistic];
        k.gain[i] = T(f.gain * static_cast<const T*>(p.rstd)[statistic]);
        k.offset[i] = T(f.offset);
      }
    }
  }

  // sums(c) are channel c's sums of dz and of dz * (x - mean).
  template <class Sums>
  void finish_backward(int64_t b, int64_t g, const Sums& sums) const {
    const double rstd = static_cast<const T*>(p.rstd)[b * p.groups + g], n = max(group_elements, 1.0);
    double level = 0, slope = 0;
    for (int64_t c = g * group_channels; c < (g + 1) * group_channels; ++c) {
      const GradientSums s = sums(c);
      const double gain = affine(b, c).gain;
      level += gain * s.dz;
      slope += gain * s.dz_d;
      static_cast<T*>(p.sum_dz)[b * p.channels + c] = T(s.dz);
      static_cast<T*>(p.sum_dz_xhat)[b * p.channels + c] = T(s.dz_d * rstd);
    }
    for (int64_t c = g * group_channels; c < (g + 1) * group_channels; ++c) {
      k.level[b * padded + c] = T(level * rstd / n);
      k.slope[b * padded + c] = T(slope * rstd * rstd * rstd / n);
    }
  }

  // Calls f(x offset, grad offset, pixel, n) for each run of n pixels along the innermost axis.
  template <class F>
  INLINE void for_runs(int64_t begin, int64_t end, const F& f) const {
    const int inner = p.dims - 1;
    while (begin < end) {
      const int64_t i = begin % p.size[inner], n = min(end - begin, p.size[inner] - i);
      int64_t rest = begin / p.size[inner], x = i * p.x_stride[inner], grad = i * p.grad_stride[inner];
      for (int d = inner - 1; d >= 0; --d) {
        x += rest % p.size[d] * p.x_stride[d], grad += rest % p.size[d] * p.grad_stride[d];
        rest /= p.size[d];
      }
      f(x, grad, begin, n);
      begin += n;
    }
  }

  template <Activation A>
  INLINE Vec<T> add_gradient(Vec<T> x, Vec<T> g, const ChannelCoefficients<T>& kc, Vec<T>& dz_sum,
                             Vec<T>& dz_d_sum) const {
    const Vec<T> d = x - kc.center, dz = before_activation<A, T>(d, g, kc, p.activation);
    dz_sum += dz, dz_d_sum += dz * d;
    return dz;
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
