#include "ops/cpu/group_norm_sweeps.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Work is cut into pieces by shape alone, so that sums are the same for any number of threads.
constexpr int64_t kInnermostPiece = 256;  // pixels of one image, at most
constexpr int64_t kTile = 2048;           // elements of a few pixels, whose sums per channel stay in registers

// How far ahead of what is written its neighbours are asked for, in elements.
constexpr int64_t kAheadOfWrites = 1024;

// Calls f<K>(i) for K vectors of L elements from i on, as many as n elements hold, and returns where they end.
template <int L, int kAtOnce, class F>
INLINE int64_t for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  if constexpr (kAtOnce > 1)
    for (; i + kAtOnce * L <= n; i += kAtOnce * L) f.template operator()<kAtOnce>(i);
  for (; i + L <= n; i += L) f.template operator()<1>(i);
  return i;
}

// Neighbours in double precision.
template <class T>
INLINE Vec<double> widen(const T* p) {
  typedef T Part __attribute__((vector_size(kLanes<double> * sizeof(T))));
  Part part;
  __builtin_memcpy(&part, p, sizeof(part));
  return __builtin_convertvector(part, Vec<double>);
}

template <bool kBackward, class T>
INLINE ChannelCoefficients<T> neighbours(const Coefficients<T>& k, int64_t i) {
  ChannelCoefficients<T> c{load(k.center + i), load(k.gain + i), load(k.offset + i), {}, {}};
  if constexpr (kBackward) c.slope = load(k.slope + i), c.level = load(k.level + i);
  return c;
}

// Channels are innermost: a unit is one image, a piece some of its pixels.
template <class S>
struct InnermostGroupNorm : GroupNorm<S> {
  using Base = GroupNorm<S>;
  using Base::L, Base::p, Base::group_channels, Base::padded, Base::k, Base::x_at, Base::grad_at, Base::streams,
      Base::allocate, Base::start_backward, Base::known_moments, Base::finish_forward, Base::finish_backward,
      Base::for_runs, Base::add_gradient;
  using typename Base::T;

  const int64_t piece_pixels = min<int64_t>(kInnermostPiece, max<int64_t>(32, p.pixels / 16));
  const int64_t pieces = p.channels == 0 ? 0 : ceil_div(p.pixels, piece_pixels);

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

  // Sums over one piece for each channel: of the pixels that give its pivot, of x - pivot and of its square.
  struct ChannelSums {
    T *pivot, *sums, *squares;
  };
  ChannelSums channel_sums(T* scratch, int64_t b, int64_t piece) const {
    T* const first = scratch + (b * pieces + piece) * 3 * padded;
    return {first, first + padded, first + 2 * padded};
  }
  int64_t pixels_of(int64_t piece) const { return min(piece_pixels, p.pixels - piece * piece_pixels); }

  void sum_piece(int64_t b, int64_t piece, const ChannelSums& s) const {
    const int64_t begin = piece * piece_pixels, n = pixels_of(piece), sample = ceil_div(n, kSample);
    for (int64_t c = 0; c < padded; ++c) s.pivot[c] = s.sums[c] = s.squares[c] = 0;
    for_tiles(b, begin, begin + sample, [&](const S* x, const S*, int64_t, int64_t m, int64_t stride, int64_t) {
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < p.channels; c += L)
          store(s.pivot + c, load(s.pivot + c) + load(x + i * stride + c, p.channels - c));
    });
    for (int64_t c = 0; c < padded; c += L) store(s.pivot + c, load(s.pivot + c) / T(sample));
    for_tiles(b, begin, begin + n, [&](const S* x, const S*, int64_t, int64_t m, int64_t stride, int64_t) {
      int64_t c = 0;
      for (; c + kWide * L <= p.channels; c += kWide * L) add_pixels<kWide>(x, c, m, stride, kWide * L, s);
      for (; c < p.channels; c += L) add_pixels<1>(x, c, m, stride, p.channels - c, s);
    });
  }

  // From the sums of all pieces, about the pivots of the first: sums and squares are scratch for each channel. Pieces
  // are added channel by channel, in vectors, and groups only then: group by group, each piece of 64 pixels would take
  // as long again as its sums.
  void combine_channels(int64_t b, T* scratch, double* sums, double* squares) const {
    constexpr int D = kLanes<double>;
    const T* const pivot = channel_sums(scratch, b, 0).pivot;
    for (int64_t c = 0; c < padded; ++c) sums[c] = squares[c] = 0;
    for (int64_t i = 0; i < pieces; ++i) {
      const ChannelSums part = channel_sums(scratch, b, i);
      const double n = pixels_of(i), share = 1 / n;
      for (int64_t c = 0; c < padded; c += D) {
        const Vec<double> sum = widen(part.sums + c), mean = widen(part.pivot + c) - widen(pivot + c) + sum * share;
        store(sums + c, load(sums + c) + n * mean);
        store(squares + c, load(squares + c) + (widen(part.squares + c) - sum * sum * share + n * mean * mean));
      }
    }
  }

  // kVectors vectors of channels from c on, the last of them `channels` wide, over a tile of m pixels. What is read
  // soon is asked for line by line: in the order of the sums, which hop from pixel to pixel, 256 channels and more
  // would take 1.2x the time from memory.
  template <int kVectors>
  INLINE static void add_pixels(const S* tile, int64_t c, int64_t m, int64_t stride, int64_t channels,
                                const ChannelSums& to) {
    const S *x = tile + c, *soon = tile + m * c + kAheadOfSums;
    Vec<T> about[kVectors], s[kVectors], q[kVectors];
    for (int j = 0; j < kVectors; ++j)
      about[j] = load(to.pivot + c + j * L), s[j] = load(to.sums + c + j * L), q[j] = load(to.squares + c + j * L);
    for (int64_t i = 0; i < m; ++i, x += stride, soon += kVectors * L) {
      UNROLL(8)
      for (int j = 0; j < kVectors; ++j) {
        __builtin_prefetch(soon + j * L);
        const Vec<T> d = (kVectors > 1 ? load(x + j * L) : load(x, channels)) - about[j];
        s[j] += d, q[j] += d * d;
      }
    }
    for (int j = 0; j < kVectors; ++j) store(to.sums + c + j * L, s[j]), store(to.squares + c + j * L, q[j]);
  }

  template <Activation A>
  void gradient_sums(int64_t b, int64_t piece, T* sums) const {
    const int64_t begin = piece * piece_pixels, end = min(p.pixels, begin + piece_pixels);
    for (int64_t c = 0; c < 2 * padded; ++c) sums[c] = 0;
    for_tiles(b, begin, end, [&](const S* x, const S* grad, int64_t, int64_t m, int64_t x_stride, int64_t grad_stride) {
      int64_t c = 0;
      for (; c + kWideGradient * L <= p.channels; c += kWideGradient * L)
        add_gradient_pixels<A, kWideGradient>(b, x, grad, c, m, x_stride, grad_stride, L, sums);
      for (; c < p.channels; c += L)
        add_gradient_pixels<A, 1>(b, x, grad, c, m, x_stride, grad_stride, p.channels - c, sums);
    });
  }

  template <Activation A, int kVectors>
  INLINE void add_gradient_pixels(int64_t b, const S* x_tile, const S* grad_tile, int64_t c, int64_t m,
                                  int64_t x_stride, int64_t grad_stride, int64_t channels, T* sums) const {
    const S *x = x_tile + c, *x_soon = x_tile + m * c + kAheadOfSums;
    const S *grad = grad_tile + c, *grad_soon = grad_tile + m * c + kAheadOfSums;
    sums += c;
    Vec<T> dz[kVectors], dz_d[kVectors];
    for (int j = 0; j < kVectors; ++j) dz[j] = load(sums + j * L), dz_d[j] = load(sums + padded + j * L);
    for (int64_t i = 0; i < m; ++i, x += x_stride, grad += grad_stride) {
      UNROLL(8)
      for (int j = 0; j < kVectors; ++j) {
        const auto kc = neighbours<false>(k, b * padded + c + j * L);
        __builtin_prefetch(x_soon + j * L);
        __builtin_prefetch(grad_soon + j * L);
        if constexpr (kVectors > 1)
          this->template add_gradient<A>(load(x + j * L), load(grad + j * L), kc, dz[j], dz_d[j]);
        else
          this->template add_gradient<A>(load(x, channels), load(grad, channels), kc, dz[j], dz_d[j]);
      }
      x_soon += kVectors * L, grad_soon += kVectors * L;
    }
    for (int j = 0; j < kVectors; ++j) store(sums + j * L, dz[j]), store(sums + padded + j * L, dz_d[j]);
  }

  // The forward fetches x of the next image, the backward, which has twice as much to keep, no more than what follows.
  template <Activation A, bool kBackward, bool kStream>
  void write(int64_t b, int64_t piece, bool goes_on) const {
    const int64_t ahead = !kBackward && goes_on ? p.x_batch_stride : kAheadOfWrites;
    // SiLU's derivatives interleave: 0.9 to 0.95x of the time from caches. The forward gains nothing and compiles
    // longer.
    constexpr int kAtOnce = !kBackward || A != Activation::silu ? 1 : kVectorBytes == 64 ? 4 : 2;
    const int64_t begin = piece * piece_pixels, end = min(p.pixels, begin + piece_pixels), channels = p.channels;
    const Coefficients<T> k = this->k;  // a copy of what stores cannot reach
    for_tiles(b, begin, end,
              [=, this](const S* x, const S* grad, int64_t pixel, int64_t m, int64_t x_stride, int64_t grad_stride) {
                S* y = static_cast<S*>(p.y) + (b * p.pixels + pixel) * channels;
                for (int64_t i = 0; i < m; ++i, x += x_stride, grad += grad_stride, y += channels) {
                  const int64_t c = for_vectors<L, kAtOnce>(channels, [&]<int K>(int64_t first) {
                    Vec<T> out[K];
                    UNROLL(4)
                    for (int j = 0; j < K; ++j) {
                      const int64_t c = first + j * L;
                      const auto kc = neighbours<kBackward>(k, b * padded + c);
                      __builtin_prefetch(x + c + ahead);
                      if constexpr (kBackward) {
                        __builtin_prefetch(grad + c + ahead);
                        out[j] = gradient<A, T>(load(x + c), load(grad + c), kc, p.activation);
                      } else {
                        out[j] = normalise<A, T>(load(x + c), kc, p.activation);
                      }
                    }
                    UNROLL(4)
                    for (int j = 0; j < K; ++j) put<kStream>(y + first + j * L, out[j]);
                  });
                  if (c == channels) continue;
                  const int64_t rest = channels - c;
                  const auto kc = neighbours<kBackward>(k, b * padded + c);
                  if constexpr (kBackward)
                    store(y + c, gradient<A, T>(load(x + c, rest), load(grad + c, rest), kc, p.activation), rest);
                  else
                    store(y + c, normalise<A, T>(load(x + c, rest), kc, p.activation), rest);
                }
              });
  }

  void forward() {
    const bool streamed = streams(p.channels);
    double* channels;  // [B, 2, padded C]
    T* scratch;        // [B, pieces, 3, padded C]
    allocate(p.batch * 2 * padded, p.batch * pieces * 3 * padded, &channels, &scratch);
    two_sweeps<false>(
        p.batch, pieces, p.channels * p.pixels,
        [&](int64_t b, int64_t piece, int64_t) {
          if (!p.moments) sum_piece(b, piece, channel_sums(scratch, b, piece));
        },
        [&](int64_t b) {
          double *sums = channels + b * 2 * padded, *squares = sums + padded;
          if (!p.moments) combine_channels(b, scratch, sums, squares);
          const T* const pivot = channel_sums(scratch, b, 0).pivot;
          const double n = p.pixels;
          for (int64_t g = 0; g < p.groups; ++g) {
            const auto channel = [&](int64_t i) {
              const int64_t c = g * group_channels + i;
              return about(pivot[c], n, sums[c], squares[c]);
            };
            finish_forward(b, g, p.moments ? known_moments(b, g) : combine(group_channels, channel));
          }
        },
        [&](int64_t b, int64_t piece, int64_t, bool goes_on) {
          if (!p.y) return;
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? write<A, false, true>(b, piece, goes_on) : write<A, false, false>(b, piece, goes_on);
          });
        });
  }

  void backward() {
    const bool streamed = streams(p.channels);
    double* channels;  // [B, 2, padded C]
    T* sums;           // [B, pieces, 2, padded C]
    allocate(p.batch * 2 * padded, p.batch * pieces * 2 * padded, &channels, &sums);
    start_backward();
    two_sweeps<false>(
        p.batch, pieces, p.channels * p.pixels,
        [&](int64_t b, int64_t piece, int64_t) {
          dispatch_usual(p.activation,
                         [&]<Activation A>() { gradient_sums<A>(b, piece, sums + (b * pieces + piece) * 2 * padded); });
        },
        [&](int64_t b) {
          double* const of_image = channels + b * 2 * padded;
          for (int64_t c = 0; c < 2 * padded; ++c) of_image[c] = 0;
          for (int64_t i = 0; i < pieces; ++i) {
            const T* part = sums + (b * pieces + i) * 2 * padded;
            for (int64_t c = 0; c < 2 * padded; c += kLanes<double>)
              store(of_image + c, load(of_image + c) + widen(part + c));
          }
          for (int64_t g = 0; g < p.groups; ++g)
            finish_backward(b, g, [&](int64_t c) { return GradientSums{of_image[c], of_image[padded + c]}; });
        },
        [&](int64_t b, int64_t piece, int64_t, bool goes_on) {
          dispatch_usual(p.activation, [&]<Activation A>() {
            streamed ? write<A, true, true>(b, piece, goes_on) : write<A, true, false>(b, piece, goes_on);
          });
        });
  }
};

}  // namespace

void group_norm_innermost_kernel(const GroupNormParams& p) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    InnermostGroupNorm<S> norm{{p}};
    p.backward ? norm.backward() : norm.forward();
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
