#include "ops/cpu/group_norm_sweeps.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Work is cut into pieces by shape alone, so that sums are the same for any number of threads.
constexpr int64_t kPlanarPiece = 4096;  // elements of one group: in float, half of L1

// Groups up to this size keep dz between the sweeps of the backward: out of the caches it is read again faster than
// worked out (1.5x for SiLU). Where channels are innermost a unit is an image, too large for that: even images of 512
// KB gain nothing.
constexpr int64_t kKeptBytes = int64_t{1} << 20;

template <bool kBackward, class T>
INLINE ChannelCoefficients<T> splat(const Coefficients<T>& k, int64_t i) {
  ChannelCoefficients<T> c{broadcast(k.center[i]), broadcast(k.gain[i]), broadcast(k.offset[i]), {}, {}};
  if constexpr (kBackward) c.slope = broadcast(k.slope[i]), c.level = broadcast(k.level[i]);
  return c;
}

// All lanes from n on become zero.
template <class T>
INLINE Vec<T> keep(Vec<T> v, int64_t n) {
  Bits<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  using Lane = __typeof__(lane[0] + 0);
  return select<T>(lane < static_cast<Lane>(n), v, Vec<T>{});
}

// In a tree: lane by lane, short runs would spend as long on their last vector as on their pixels.
template <class T>
INLINE T tree_sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int n = kLanes<T> / 2; n >= 1; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// A unit is one group of one image, a piece some of its channels or a part of one channel.
template <class S>
struct PlanarGroupNorm : GroupNorm<S> {
  using Base = GroupNorm<S>;
  using Base::L, Base::p, Base::group_channels, Base::group_elements, Base::padded, Base::k, Base::x_at, Base::grad_at,
      Base::y_at, Base::streams, Base::allocate, Base::start_backward, Base::known_moments, Base::finish_forward,
      Base::finish_backward, Base::for_runs, Base::add_gradient;
  using typename Base::T;

  const int64_t chunks = max<int64_t>(1, ceil_div(p.pixels, kPlanarPiece));
  const int64_t piece_channels = max<int64_t>(1, min(group_channels, kPlanarPiece / max<int64_t>(1, p.pixels)));
  const int64_t pieces = ceil_div(group_channels, piece_channels) * chunks;

  // Calls f(image, channel, first pixel, end pixel) for the channels of a piece.
  template <class F>
  INLINE void for_channels(int64_t unit, int64_t piece, const F& f) const {
    const int64_t b = unit / p.groups, first_channel = unit % p.groups * group_channels;
    const int64_t first = piece / chunks * piece_channels, n = min(piece_channels, group_channels - first);
    const int64_t begin = piece % chunks * kPlanarPiece, end = min(p.pixels, begin + kPlanarPiece);
    for (int64_t c = 0; c < n; ++c) f(b, first_channel + first + c, begin, end);
  }

  Moments piece_moments(int64_t unit, int64_t piece) const {
    int64_t n = 0, sampled = 0;
    for_channels(unit, piece, [&](int64_t, int64_t, int64_t begin, int64_t end) { n += end - begin; });
    const int64_t sample = ceil_div(n, kSample);
    Vec<T> total{};
    for_channels(unit, piece, [&](int64_t b, int64_t c, int64_t begin, int64_t end) {
      end = min(end, begin + sample - sampled);
      for_runs(begin, end, [&](int64_t x, int64_t, int64_t, int64_t length) {
        for (int64_t i = 0; i < length; i += L) total += load(x_at(b, c) + x + i, length - i);
        sampled += length;
      });
    });
    const T pivot = tree_sum<T>(total) / T(max<int64_t>(sampled, 1));

    Vec<T> sums[4] = {}, squares[4] = {};
    const auto add = [&](int j, Vec<T> d) { sums[j] += d, squares[j] += d * d; };
    for_channels(unit, piece, [&](int64_t b, int64_t c, int64_t begin, int64_t end) {
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
    return about(pivot, n, tree_sum<T>(sums[0] + sums[1] + (sums[2] + sums[3])),
                 tree_sum<T>(squares[0] + squares[1] + (squares[2] + squares[3])));
  }

  // kKeep leaves dz in kept_group, where write finds it.
  template <Activation A, bool kKeep>
  void gradient_sums(int64_t unit, int64_t piece, S* kept_group, T* sums) const {
    for_channels(unit, piece, [&](int64_t b, int64_t c, int64_t begin, int64_t end) {
      const auto kc = splat<false>(k, b * padded + c);
      Vec<T> dz{}, dz_d{};
      for_runs(begin, end, [&](int64_t x_offset, int64_t grad_offset, int64_t pixel, int64_t length) {
        const S *x = x_at(b, c) + x_offset, *grad = grad_at(b, c) + grad_offset;
        [[maybe_unused]] S* kept = kept_group + c % group_channels * p.pixels + pixel;
        int64_t i = 0;
        for (; i + L <= length; i += L) {
          __builtin_prefetch(x + i + kAheadOfSums);
          __builtin_prefetch(grad + i + kAheadOfSums);
          const Vec<T> v = this->template add_gradient<A>(load(x + i), load(grad + i), kc, dz, dz_d);
          if constexpr (kKeep) store(kept + i, v);
        }
        if (i == length) return;
        const int64_t rest = length - i;
        const Vec<T> v = this->template add_gradient<A>(load(x + i, rest), load(grad + i, rest), kc, dz, dz_d);
        if constexpr (kKeep) store(kept + i, v, rest);
      });
      *sums++ = tree_sum<T>(dz);
      *sums++ = tree_sum<T>(dz_d);
    });
  }

  // The distance from x of a unit to that of the next.
  int64_t to_next_unit(int64_t unit) const {
    const int64_t next_group = group_channels * p.x_c_stride;
    return (unit + 1) % p.groups ? next_group : p.x_batch_stride - (p.groups - 1) * next_group;
  }

  // kKeep finds dz, which is past the activation, in kept_group. The forward fetches x of the next unit, which is read
  // after this.
  template <Activation A, bool kBackward, bool kStream, bool kKeep = false>
  void write(int64_t unit, int64_t piece, bool goes_on, const S* kept_group = nullptr) const {
    [[maybe_unused]] const int64_t ahead = goes_on ? to_next_unit(unit) : 0;
    for_channels(unit, piece, [&](int64_t b, int64_t c, int64_t begin, int64_t end) {
      const auto kc = splat<kBackward>(k, b * padded + c);
      for_runs(begin, end, [&](int64_t x_offset, int64_t grad_offset, int64_t pixel, int64_t length) {
        const S *x = x_at(b, c) + x_offset, *grad = kBackward ? grad_at(b, c) + grad_offset : nullptr;
        S* y = y_at(b, c) + pixel;
        if constexpr (kKeep) grad = kept_group + c % group_channels * p.pixels + pixel;
        int64_t i = 0;
        for (; i + L <= length; i += L) {
          if constexpr (!kBackward) __builtin_prefetch(x + i + ahead, 0, 3);
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

  void forward() {
    const bool streamed = streams(p.size[p.dims - 1]);
    const int64_t units = p.batch * p.groups;
    Moments* moments;
    T* none;
    allocate(units * pieces, 0, &moments, &none);
    two_sweeps<true>(
        units, pieces, group_channels * p.pixels,
        [&](int64_t unit, int64_t piece, int64_t) {
          if (!p.moments) moments[unit * pieces + piece] = piece_moments(unit, piece);
        },
        [&](int64_t unit) {
          const Moments* parts = moments + unit * pieces;
          const int64_t b = unit / p.groups, g = unit % p.groups;
          finish_forward(b, g, p.moments ? known_moments(b, g) : combine(pieces, [&](int64_t i) { return parts[i]; }));
        },
        [&](int64_t unit, int64_t piece, int64_t, bool goes_on) {
          if (!p.y) return;
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? write<A, false, true>(unit, piece, goes_on) : write<A, false, false>(unit, piece, goes_on);
          });
        });
  }

  void backward() {
    constexpr bool kCanKeep = sizeof(S) == sizeof(T);  // half precision would round dz
    const bool keep = kCanKeep && p.activation != Activation::linear && group_elements * sizeof(S) <= kKeptBytes;
    const bool streamed = streams(p.size[p.dims - 1]);
    const int64_t units = p.batch * p.groups, width = 2 * piece_channels, group = group_channels * p.pixels;
    const int64_t kept = keep && streamed ? num_threads() * group : 0;
    Moments* none;
    T* scratch;  // dz of a group for each thread, at whole lines; then the sums
    allocate(0, kept + units * pieces * width, &none, &scratch);
    T* const sums = scratch + kept;
    // Where dz of a group is kept: where y comes, unless that is stored past the caches.
    const auto kept_group = [&](int64_t unit, int64_t thread) {
      if (streamed && thread != kShared) return static_cast<S*>(static_cast<void*>(scratch + thread * group));
      return y_at(unit / p.groups, unit % p.groups * group_channels);
    };
    start_backward();
    two_sweeps<false>(
        units, pieces, group_channels * p.pixels,
        [&](int64_t unit, int64_t piece, int64_t thread) {
          T* out = sums + (unit * pieces + piece) * width;
          dispatch_usual(p.activation, [&]<Activation A>() {
            keep ? gradient_sums<A, kCanKeep>(unit, piece, kept_group(unit, thread), out)
                 : gradient_sums<A, false>(unit, piece, nullptr, out);
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
        [&](int64_t unit, int64_t piece, int64_t thread, bool) {
          if (keep) {
            const S* from = kept_group(unit, thread);
            return streamed && thread != kShared
                       ? write<Activation::linear, true, true, true>(unit, piece, false, from)
                       : write<Activation::linear, true, false, true>(unit, piece, false, from);
          }
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? write<A, true, true>(unit, piece, false) : write<A, true, false>(unit, piece, false);
          });
        });
  }
};

}  // namespace

void group_norm_planar_kernel(const GroupNormParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    PlanarGroupNorm<S> norm{{p}};
    p.backward ? norm.backward() : norm.forward();
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
