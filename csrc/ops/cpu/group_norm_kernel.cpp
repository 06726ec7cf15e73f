#include "common/memory.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "ops/group_norm.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Work is cut into pieces by shape alone, so that sums are the same for any number of threads.
constexpr int64_t kPlanarPiece = 4096;    // elements of one group: in float, half of L1
constexpr int64_t kInnermostPiece = 256;  // pixels of one image, at most
constexpr int64_t kTile = 4096;           // elements of a few pixels that the channel blocks revisit in L1
constexpr int64_t kSample = 16;           // one element in so many gives the pivot of a piece
constexpr int64_t kGrain = 32768;         // elements that are worth a thread

// Outputs from this size on are stored past the caches: read and written through them, an output of 16 MB costs its own
// memory's traffic again (1.4x in all), while a smaller one is still in cache when the next layer reads it.
constexpr int64_t kStreamedBytes = int64_t{12} << 20;

// Groups up to this size keep dz between the sweeps of the backward: out of the caches it is
// read again faster than worked out (1.5x for SiLU). Where channels are innermost a unit is an image, too large for
// that.
constexpr int64_t kKeptBytes = int64_t{1} << 20;

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

template <bool kBackward, class T>
INLINE ChannelCoefficients<T> splat(const Coefficients<T>& k, int64_t i) {
  ChannelCoefficients<T> c{broadcast(k.center[i]), broadcast(k.gain[i]), broadcast(k.offset[i]), {}, {}};
  if constexpr (kBackward) c.slope = broadcast(k.slope[i]), c.level = broadcast(k.level[i]);
  return c;
}
template <bool kBackward, class T>
INLINE ChannelCoefficients<T> neighbours(const Coefficients<T>& k, int64_t i) {
  ChannelCoefficients<T> c{load(k.center + i), load(k.gain + i), load(k.offset + i), {}, {}};
  if constexpr (kBackward) c.slope = load(k.slope + i), c.level = load(k.level + i);
  return c;
}

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
// whole units does each of them to its end while it is in cache. The second sweep goes backwards: what the first
// read last is still there.
template <class First, class Finish, class Second>
INLINE void two_sweeps(int64_t units, int64_t pieces, int64_t unit_elements, const First& first, const Finish& finish,
                       const Second& second) {
  const int64_t grain = ceil_div(kGrain, max<int64_t>(unit_elements, 1)), threads = num_threads();
  if (units % threads == 0 || units >= 8 * threads || units * unit_elements <= kGrain) {
    parallel_for(units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        for (int64_t i = 0; i < pieces; ++i) first(unit, i);
        finish(unit);
        for (int64_t i = pieces - 1; i >= 0; --i) second(unit, i);
      }
      finish_streams();
    });
    return;
  }
  const int64_t piece_grain = ceil_div(kGrain * pieces, max<int64_t>(unit_elements, 1));
  parallel_for(units * pieces, piece_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) first(i / pieces, i % pieces);
  });
  parallel_for(units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) finish(unit);
  });
  parallel_for(units * pieces, piece_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) second(i / pieces, i % pieces);
    finish_streams();
  });
}

// All lanes from n on become zero.
template <class T>
INLINE Vec<T> keep(Vec<T> v, int64_t n) {
  Bits<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  using Lane = __typeof__(lane[0] + 0);
  return select<T>(lane < static_cast<Lane>(n), v, Vec<T>{});
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

  // Scratch memory: the coefficients, `moments` Moments and `sums` more numbers.
  void allocate(int64_t moments, int64_t sums, Moments** moments_out, T** sums_out) {
    const int64_t n = p.batch * padded;
    char* memory = static_cast<char*>(workspace(moments * sizeof(Moments) + (5 * n + sums) * sizeof(T)));
    T* numbers = static_cast<T*>(static_cast<void*>(memory + moments * sizeof(Moments)));
    k = {numbers, numbers + n, numbers + 2 * n, numbers + 3 * n, numbers + 4 * n};
    *sums_out = numbers + 5 * n;
    *moments_out = static_cast<Moments*>(static_cast<void*>(memory));
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

  // Planar: a unit is one group of one image, a piece some of its channels or a part of one channel.

  const int64_t chunks = max<int64_t>(1, ceil_div(p.pixels, kPlanarPiece));
  const int64_t piece_channels = max<int64_t>(1, min(group_channels, kPlanarPiece / max<int64_t>(1, p.pixels)));
  const int64_t planar_pieces = ceil_div(group_channels, piece_channels) * chunks;

  // Calls f(channel, first pixel, end pixel) for the channels of a piece.
  template <class F>
  INLINE void for_channels(int64_t g, int64_t piece, const F& f) const {
    const int64_t first = piece / chunks * piece_channels, n = min(piece_channels, group_channels - first);
    const int64_t begin = piece % chunks * kPlanarPiece, end = min(p.pixels, begin + kPlanarPiece);
    for (int64_t c = 0; c < n; ++c) f(g * group_channels + first + c, begin, end);
  }

  Moments planar_moments(int64_t b, int64_t g, int64_t piece) const {
    int64_t n = 0, sampled = 0;
    for_channels(g, piece, [&](int64_t, int64_t begin, int64_t end) { n += end - begin; });
    const int64_t sample = ceil_div(n, kSample);
    Vec<T> total{};
    for_channels(g, piece, [&](int64_t c, int64_t begin, int64_t end) {
      end = min(end, begin + sample - sampled);
      for_runs(begin, end, [&](int64_t x, int64_t, int64_t, int64_t length) {
        for (int64_t i = 0; i < length; i += L) total += load(x_at(b, c) + x + i, length - i);
        sampled += length;
      });
    });
    const T pivot = sum<T>(total) / T(max<int64_t>(sampled, 1));

    Vec<T> sums[4] = {}, squares[4] = {};
    const auto add = [&](int j, Vec<T> d) { sums[j] += d, squares[j] += d * d; };
    for_channels(g, piece, [&](int64_t c, int64_t begin, int64_t end) {
      for_runs(begin, end, [&](int64_t offset, int64_t, int64_t, int64_t length) {
        const S* x = x_at(b, c) + offset;
        int64_t i = 0;
        for (; i + 4 * L <= length; i += 4 * L) {
          UNROLL(4)
          for (int j = 0; j < 4; ++j) add(j, load(x + i + j * L) - pivot);
        }
        for (; i + L <= length; i += L) add(0, load(x + i) - pivot);
        if (i < length) add(0, keep<T>(load(x + i, length - i) - pivot, length - i));
      });
    });
    return about(pivot, n, sum<T>(sums[0] + sums[1] + (sums[2] + sums[3])),
                 sum<T>(squares[0] + squares[1] + (squares[2] + squares[3])));
  }

  // kKeep leaves dz in y, where planar_write finds it.
  template <Activation A, bool kKeep>
  void planar_gradient_sums(int64_t b, int64_t g, int64_t piece, T* sums) const {
    for_channels(g, piece, [&](int64_t c, int64_t begin, int64_t end) {
      const auto kc = splat<false>(k, b * padded + c);
      Vec<T> dz{}, dz_d{};
      for_runs(begin, end, [&](int64_t x_offset, int64_t grad_offset, int64_t pixel, int64_t length) {
        const S *x = x_at(b, c) + x_offset, *grad = grad_at(b, c) + grad_offset;
        [[maybe_unused]] S* y = y_at(b, c) + pixel;
        int64_t i = 0;
        for (; i + L <= length; i += L) {
          const Vec<T> kept = add_gradient<A>(load(x + i), load(grad + i), kc, dz, dz_d);
          if constexpr (kKeep) store(y + i, kept);
        }
        if (i == length) return;
        const int64_t rest = length - i;
        const Vec<T> kept = add_gradient<A>(load(x + i, rest), load(grad + i, rest), kc, dz, dz_d);
        if constexpr (kKeep) store(y + i, kept, rest);
      });
      *sums++ = sum<T>(dz);
      *sums++ = sum<T>(dz_d);
    });
  }

  // kKeep finds dz, which is past the activation, in y.
  template <Activation A, bool kBackward, bool kStream, bool kKeep = false>
  void planar_write(int64_t b, int64_t g, int64_t piece) const {
    for_channels(g, piece, [&](int64_t c, int64_t begin, int64_t end) {
      const auto kc = splat<kBackward>(k, b * padded + c);
      for_runs(begin, end, [&](int64_t x_offset, int64_t grad_offset, int64_t pixel, int64_t length) {
        const S *x = x_at(b, c) + x_offset, *grad = kBackward ? grad_at(b, c) + grad_offset : nullptr;
        S* y = y_at(b, c) + pixel;
        if constexpr (kKeep) grad = y;
        int64_t i = 0;
        for (; i + L <= length; i += L) {
          if constexpr (kBackward)
            put<kStream>(y + i, gradient<A, T>(load(x + i), load(grad + i), kc, p.activation));
          else
            put<kStream>(y + i, normalise<A, T>(load(x + i), kc, p.activation));
        }
        if (i == length) return;
        const int64_t rest = length - i;
        if constexpr (kBackward)
          store(y + i, gradient<A, T>(load(x + i, rest), load(grad + i, rest), kc, p.activation), rest);
        else
          store(y + i, normalise<A, T>(load(x + i, rest), kc, p.activation), rest);
      });
    });
  }

  void planar_forward() {
    const bool streamed = streams(p.size[p.dims - 1]);
    const int64_t units = p.batch * p.groups, pieces = planar_pieces;
    Moments* moments;
    T* none;
    allocate(units * pieces, 0, &moments, &none);
    two_sweeps(
        units, pieces, group_channels * p.pixels,
        [&](int64_t unit, int64_t piece) {
          moments[unit * pieces + piece] = planar_moments(unit / p.groups, unit % p.groups, piece);
        },
        [&](int64_t unit) {
          const Moments* parts = moments + unit * pieces;
          finish_forward(unit / p.groups, unit % p.groups, combine(pieces, [&](int64_t i) { return parts[i]; }));
        },
        [&](int64_t unit, int64_t piece) {
          if (!p.y) return;
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? planar_write<A, false, true>(unit / p.groups, unit % p.groups, piece)
                     : planar_write<A, false, false>(unit / p.groups, unit % p.groups, piece);
          });
        });
  }

  void planar_backward() {
    constexpr bool kCanKeep = sizeof(S) == sizeof(T);  // half precision would round dz
    const bool keep = kCanKeep && p.activation != Activation::linear && group_elements * sizeof(S) <= kKeptBytes;
    const bool streamed = !keep && streams(p.size[p.dims - 1]);
    const int64_t units = p.batch * p.groups, pieces = planar_pieces, width = 2 * piece_channels;
    Moments* none;
    T* sums;
    allocate(0, units * pieces * width, &none, &sums);
    start_backward();
    two_sweeps(
        units, pieces, group_channels * p.pixels,
        [&](int64_t unit, int64_t piece) {
          T* out = sums + (unit * pieces + piece) * width;
          dispatch_usual(p.activation, [&]<Activation A>() {
            keep ? planar_gradient_sums<A, kCanKeep>(unit / p.groups, unit % p.groups, piece, out)
                 : planar_gradient_sums<A, false>(unit / p.groups, unit % p.groups, piece, out);
          });
        },
        [&](int64_t unit) {
          const int64_t g = unit % p.groups;
          finish_backward(unit / p.groups, g, [&](int64_t c) {
            c -= g * group_channels;
            GradientSums s{};
            for (int64_t i = 0; i < chunks; ++i) {
              const int64_t piece = unit * pieces + c / piece_channels * chunks + i;
              const T* part = sums + piece * width + c % piece_channels * 2;
              s.dz += part[0], s.dz_d += part[1];
            }
            return s;
          });
        },
        [&](int64_t unit, int64_t piece) {
          if (keep) return planar_write<Activation::linear, true, false, true>(unit / p.groups, unit % p.groups, piece);
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? planar_write<A, true, true>(unit / p.groups, unit % p.groups, piece)
                     : planar_write<A, true, false>(unit / p.groups, unit % p.groups, piece);
          });
        });
  }

  // Channels innermost: a unit is one image, a piece some of its pixels.

  const int64_t piece_pixels = min<int64_t>(kInnermostPiece, max<int64_t>(32, p.pixels / 16));
  const int64_t innermost_pieces = p.channels == 0 ? 0 : ceil_div(p.pixels, piece_pixels);

  // Calls f(x, grad, first pixel, n, x's stride, grad's stride) for tiles of n pixels at equal distances.
  template <class F>
  INLINE void for_tiles(int64_t b, int64_t begin, int64_t end, const F& f) const {
    const int64_t tile = max<int64_t>(1, kTile / p.channels);
    const int64_t x_stride = p.x_stride[p.dims - 1], grad_stride = p.grad_stride[p.dims - 1];
    for_runs(begin, end, [&](int64_t x, int64_t grad, int64_t pixel, int64_t length) {
      for (int64_t i = 0; i < length; i += tile)
        f(x_at(b, 0) + x + i * x_stride, p.backward ? grad_at(b, 0) + grad + i * grad_stride : nullptr, pixel + i,
          min(tile, length - i), x_stride, grad_stride);
    });
  }

  // Vectors of channels whose sums stay in registers: three registers each of 32, or of 16.
  static constexpr int kWide = kVectorBytes == 64 ? 8 : 4, kWideGradient = 4;

  // The moments of every group over one piece; pivot, sums and squares are scratch for each channel.
  void innermost_moments(int64_t b, int64_t piece, T* pivot, T* sums, T* squares, Moments* moments) const {
    const int64_t begin = piece * piece_pixels, n = min(piece_pixels, p.pixels - begin), sample = ceil_div(n, kSample);
    for (int64_t c = 0; c < padded; ++c) pivot[c] = sums[c] = squares[c] = 0;
    for_tiles(b, begin, begin + sample, [&](const S* x, const S*, int64_t, int64_t m, int64_t stride, int64_t) {
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < p.channels; c += L)
          store(pivot + c, load(pivot + c) + load(x + i * stride + c, p.channels - c));
    });
    for (int64_t c = 0; c < padded; ++c) pivot[c] /= T(sample);
    for_tiles(b, begin, begin + n, [&](const S* x, const S*, int64_t, int64_t m, int64_t stride, int64_t) {
      int64_t c = 0;
      for (; c + kWide * L <= p.channels; c += kWide * L)
        add_pixels<kWide>(x + c, m, stride, kWide * L, pivot + c, sums + c, squares + c);
      for (; c < p.channels; c += L) add_pixels<1>(x + c, m, stride, p.channels - c, pivot + c, sums + c, squares + c);
    });
    for (int64_t g = 0; g < p.groups; ++g) {
      double total = 0, m2 = 0;
      const double share = 1.0 / n;
      const int64_t first = g * group_channels, last = first + group_channels;
      for (int64_t c = first; c < last; ++c) total += pivot[c] + sums[c] * share;
      const double mean = total / group_channels;
      for (int64_t c = first; c < last; ++c) {
        const double sum = sums[c], d = pivot[c] + sum * share - mean;
        m2 += squares[c] - sum * sum * share + n * d * d;
      }
      moments[g] = {double(n * group_channels), mean, max(0.0, m2)};
    }
  }

  // kVectors vectors of channels, the last of them `channels` wide, over m pixels.
  template <int kVectors>
  INLINE static void add_pixels(const S* x, int64_t m, int64_t stride, int64_t channels, const T* pivot, T* sums,
                                T* squares) {
    Vec<T> about[kVectors], s[kVectors], q[kVectors];
    for (int j = 0; j < kVectors; ++j)
      about[j] = load(pivot + j * L), s[j] = load(sums + j * L), q[j] = load(squares + j * L);
    for (int64_t i = 0; i < m; ++i) {
      UNROLL(8)
      for (int j = 0; j < kVectors; ++j) {
        const Vec<T> d = (kVectors > 1 ? load(x + j * L) : load(x, channels)) - about[j];
        s[j] += d, q[j] += d * d;
      }
      x += stride;
    }
    for (int j = 0; j < kVectors; ++j) store(sums + j * L, s[j]), store(squares + j * L, q[j]);
  }

  template <Activation A>
  void innermost_gradient_sums(int64_t b, int64_t piece, T* sums) const {
    const int64_t begin = piece * piece_pixels, end = min(p.pixels, begin + piece_pixels);
    for (int64_t c = 0; c < 2 * padded; ++c) sums[c] = 0;
    for_tiles(b, begin, end, [&](const S* x, const S* grad, int64_t, int64_t m, int64_t x_stride, int64_t grad_stride) {
      int64_t c = 0;
      for (; c + kWideGradient * L <= p.channels; c += kWideGradient * L)
        add_gradient_pixels<A, kWideGradient>(x + c, grad + c, m, x_stride, grad_stride, L, b * padded + c, sums + c);
      for (; c < p.channels; c += L)
        add_gradient_pixels<A, 1>(x + c, grad + c, m, x_stride, grad_stride, p.channels - c, b * padded + c, sums + c);
    });
  }

  template <Activation A, int kVectors>
  INLINE void add_gradient_pixels(const S* x, const S* grad, int64_t m, int64_t x_stride, int64_t grad_stride,
                                  int64_t channels, int64_t coefficient, T* sums) const {
    Vec<T> dz[kVectors], dz_d[kVectors];
    for (int j = 0; j < kVectors; ++j) dz[j] = load(sums + j * L), dz_d[j] = load(sums + padded + j * L);
    for (int64_t i = 0; i < m; ++i, x += x_stride, grad += grad_stride) {
      UNROLL(8)
      for (int j = 0; j < kVectors; ++j) {
        const auto kc = neighbours<false>(k, coefficient + j * L);
        if constexpr (kVectors > 1)
          add_gradient<A>(load(x + j * L), load(grad + j * L), kc, dz[j], dz_d[j]);
        else
          add_gradient<A>(load(x, channels), load(grad, channels), kc, dz[j], dz_d[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) store(sums + j * L, dz[j]), store(sums + padded + j * L, dz_d[j]);
  }

  template <Activation A, bool kBackward, bool kStream>
  void innermost_write(int64_t b, int64_t piece) const {
    const int64_t begin = piece * piece_pixels, end = min(p.pixels, begin + piece_pixels);
    for_tiles(b, begin, end,
              [&](const S* x, const S* grad, int64_t pixel, int64_t m, int64_t x_stride, int64_t grad_stride) {
                S* y = static_cast<S*>(p.y) + (b * p.pixels + pixel) * p.channels;
                for (int64_t i = 0; i < m; ++i, x += x_stride, grad += grad_stride, y += p.channels) {
                  int64_t c = 0;
                  for (; c + L <= p.channels; c += L) {
                    const auto kc = neighbours<kBackward>(k, b * padded + c);
                    if constexpr (kBackward)
                      put<kStream>(y + c, gradient<A, T>(load(x + c), load(grad + c), kc, p.activation));
                    else
                      put<kStream>(y + c, normalise<A, T>(load(x + c), kc, p.activation));
                  }
                  if (c == p.channels) continue;
                  const int64_t rest = p.channels - c;
                  const auto kc = neighbours<kBackward>(k, b * padded + c);
                  if constexpr (kBackward)
                    store(y + c, gradient<A, T>(load(x + c, rest), load(grad + c, rest), kc, p.activation), rest);
                  else
                    store(y + c, normalise<A, T>(load(x + c, rest), kc, p.activation), rest);
                }
              });
  }

  void innermost_forward() {
    const bool streamed = streams(p.channels);
    const int64_t pieces = innermost_pieces;
    Moments* moments;  // [B, pieces, groups]
    T* scratch;        // [B, pieces, 3, padded C]
    allocate(p.batch * pieces * p.groups, p.batch * pieces * 3 * padded, &moments, &scratch);
    two_sweeps(
        p.batch, pieces, p.channels * p.pixels,
        [&](int64_t b, int64_t piece) {
          T* s = scratch + (b * pieces + piece) * 3 * padded;
          innermost_moments(b, piece, s, s + padded, s + 2 * padded, moments + (b * pieces + piece) * p.groups);
        },
        [&](int64_t b) {
          for (int64_t g = 0; g < p.groups; ++g)
            finish_forward(b, g, combine(pieces, [&](int64_t i) { return moments[(b * pieces + i) * p.groups + g]; }));
        },
        [&](int64_t b, int64_t piece) {
          if (!p.y) return;
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? innermost_write<A, false, true>(b, piece) : innermost_write<A, false, false>(b, piece);
          });
        });
  }

  void innermost_backward() {
    const bool streamed = streams(p.channels);
    const int64_t pieces = innermost_pieces;
    Moments* none;
    T* sums;  // [B, pieces, 2, padded C]
    allocate(0, p.batch * pieces * 2 * padded, &none, &sums);
    start_backward();
    two_sweeps(
        p.batch, pieces, p.channels * p.pixels,
        [&](int64_t b, int64_t piece) {
          dispatch_usual(p.activation, [&]<Activation A>() {
            innermost_gradient_sums<A>(b, piece, sums + (b * pieces + piece) * 2 * padded);
          });
        },
        [&](int64_t b) {
          for (int64_t g = 0; g < p.groups; ++g)
            finish_backward(b, g, [&](int64_t c) {
              GradientSums s{};
              for (int64_t i = 0; i < pieces; ++i) {
                const T* part = sums + (b * pieces + i) * 2 * padded + c;
                s.dz += part[0], s.dz_d += part[padded];
              }
              return s;
            });
        },
        [&](int64_t b, int64_t piece) {
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? innermost_write<A, true, true>(b, piece) : innermost_write<A, true, false>(b, piece);
          });
        });
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

void group_norm_kernel(const GroupNormParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    GroupNorm<S> norm{p};
    if (p.backward)
      p.channels_innermost ? norm.innermost_backward() : norm.planar_backward();
    else
      p.channels_innermost ? norm.innermost_forward() : norm.planar_forward();
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
