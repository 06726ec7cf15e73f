// Convolution 3x3 of few input channels (images, latents), where transforms in two dimensions would cost more than they
// save: by F(2,3) along the rows, four products for two outputs where the plain way takes six, with the sums of a block
// of outputs in registers from the first product to the last.
//
// Two outputs side by side are a tile. Its four pixels x become x0 - x2, x1 + x2, x2 - x1 and x1 - x3, the weights of a
// row of the kernel w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2 and w2; of their products m, summed over rows and
// channels, the outputs are m0 + m1 + m2 and m1 - m2 - m3.
#pragma once
#include "few_inputs_tiles.h"

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Lanes are output channels in channels_last and tiles in planes, so that every vector is stored as it is. Channels
// that fill no more than half a vector are convolved as planes and joined: half the time.
template <class T>
class FewInputs {
  static constexpr int L = kLanes<T>, kPanel = kPanelVectors * L;
  // Sums in registers, in vectors for each of the four products: R tiles, or output channels, that share what is loaded
  // of the other side, by V vectors of it.
  static constexpr int kWeights = 3 * kProductsOfTile * kPanel;  // of an input channel
  static constexpr int kSums = kVectorBytes == 64 ? 6 : 3, kVectors = kVectorBytes == 64 ? 2 : 1;
  static constexpr int kJoined = L / 2;

  const ProductConvParams& p;
  const InputTiles<T> input;
  const int64_t panels;

 public:
  explicit FewInputs(const ProductConvParams& p) : p(p), input(p), panels(ceil_div(p.cout, kPanel)) {}

  void run(const PackWeightParams& w) const {
    const size_t bytes = (panels * p.cin * kWeights + kSums) * sizeof(T);  // what a block of the last channels reads
    T* const weights = static_cast<T*>(allocate(bytes));
    order(w, weights);
    const int64_t columns = ceil_div(p.out_w, input.columns), items = input.bands.items * columns;
    parallel_claim(items, [&](const auto& claim) {
      T* const tiles = static_cast<T*>(workspace(input.elements() * sizeof(T)));
      for (int64_t item; (item = claim()) < items;) {
        const int64_t w0 = item % columns * input.columns, width = min(input.columns, p.out_w - w0);
        input.bands.for_item(item / columns, [&](int64_t b, int64_t h0, int64_t h1) {
          input.fill(tiles, b, h0, w0, h1 - h0, width);
          convolve(tiles, weights, b, h0, w0, h1 - h0, width);
        });
      }
      finish_streams();
    });
    release(weights, bytes);
  }

 private:
  // [panel][cin][kernel row][product][kPanel]; what lies behind the last channel is zero.
  void order(const PackWeightParams& w, T* to) const {
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t ci = 0; ci < p.cin; ++ci, to += kWeights)
        for (int v = 0; v < kPanelVectors; ++v) {
          const int64_t co = panel * kPanel + v * L, n = max<int64_t>(0, min<int64_t>(L, p.cout - co));
          Vec<T> taps[9];
          dispatch_dtype<T>(p.dtype, [&]<class S>() __attribute__((always_inline)) { gather<S>(w, co, ci, n, taps); });
          UNROLL(3) for (int row = 0; row < 3; ++row) {
            const Vec<T> w0 = taps[3 * row], w1 = taps[3 * row + 1], w2 = taps[3 * row + 2];
            const Vec<T> even = (w0 + w2) * T(0.5), odd = w1 * T(0.5);
            const Vec<T> products[kProductsOfTile] = {w0, even + odd, even - odd, w2};
            UNROLL(4)
            for (int i = 0; i < kProductsOfTile; ++i)
              store(to + (row * kProductsOfTile + i) * kPanel + v * L, products[i]);
          }
        }
  }

  // gather_taps, by transposing whole vectors where taps lie side by side.
  template <class S>
  static INLINE void gather(const PackWeightParams& w, int64_t co, int64_t ci, int64_t n, Vec<T> (&taps)[9]) {
    if (n < L || w.w_stride[3] != 1 || w.w_stride[2] != 3) {
      T part[9][L] = {};
      gather_taps<S, 3, T>(w, co, ci, n, part);
      UNROLL(9) for (int t = 0; t < 9; ++t) taps[t] = load(part[t]);
      return;
    }
    const S* const from = static_cast<const S*>(w.w) + co * w.w_stride[0] + ci * w.w_stride[1];
    UNROLL(5) for (int t = 0; t < 9; t += L) {
      Vec<T> r[L];
      UNROLL(16) for (int k = 0; k < L; ++k) r[k] = load(from + k * w.w_stride[0] + t, 9 - t);
      transpose<T>(r);
      UNROLL(16) for (int i = 0; i < L; ++i) if (t + i < 9) taps[t + i] = r[i];
    }
  }

  void convolve(const T* tiles, const T* weights, int64_t b, int64_t h0, int64_t w0, int64_t height,
                int64_t width) const {
    // Whole rows are as one, of whole tiles each. Where that is a pixel too many, leaving it out takes as long as a
    // fifth of the products: in planes it is done where rows by themselves would leave as many lanes empty.
    const bool sparse = !p.y_channels_last && 5 * (width + 1) <= 4 * round_up(width, 2 * L);
    const bool joined = width == p.out_w && (width % 2 == 0 || sparse);
    const int64_t length = joined ? height * 2 * input.tiles : width;
    dispatch_dtype<T>(p.dtype, [&]<class S>() {
      for (int64_t h = 0; h < height; h += joined ? height : 1, tiles += input.tiles)
        if (p.y_channels_last)
          p.cout <= kJoined ? convolve_joined<S>(tiles, weights, b, h0 + h, w0, length)
                            : convolve_pixels<S>(tiles, weights, b, h0 + h, w0, length);
        else
          convolve_planes<S>(tiles, weights, b, h0 + h, w0, length);
    });
  }

  // `length` pixels from (h, w) on, side by side in y.
  template <class S>
  void convolve_pixels(const T* tiles, const T* weights, int64_t b, int64_t h, int64_t w, int64_t length) const {
    for (int64_t c = 0; c < p.cout; c += kPanel, weights += p.cin * kWeights) {
      const int64_t first = ((b * p.out_h + h) * p.out_w + w) * p.cout + c;
      const int64_t channels = min<int64_t>(kPanel, p.cout - c);
      if (kVectors == 2 && channels > L) {
        pixels<S, kVectors>(tiles, weights, c, {first, p.cout, length, channels});
      } else {
        for (int64_t k = 0; k < channels; k += L)
          pixels<S, 1>(tiles, weights + k, c + k, {first + k, p.cout, length, min<int64_t>(L, channels - k)});
      }
    }
  }

  // The same in every plane, but for the pixel too many of each row of an odd width.
  template <class S>
  void convolve_planes(const T* tiles, const T* weights, int64_t b, int64_t h, int64_t w, int64_t length) const {
    const int64_t plane = p.out_h * p.out_w, row = length > p.out_w ? 2 * input.tiles : length;
    const int64_t width = row > p.out_w ? p.out_w : kEndless;
    for (int64_t c0 = 0; c0 < p.cout; c0 += kPanel, weights += p.cin * kWeights) {
      const int64_t first = (b * p.cout + c0) * plane + h * p.out_w + w, channels = min<int64_t>(kPanel, p.cout - c0);
      int64_t x = 0;
      const auto convolve = [&]<int V>() {
        for (; length - x > 2 * (V - 1) * L; x += 2 * V * L) {
          const int64_t column = x % row, at = first + x / row * p.out_w + min(column, p.out_w);
          for (int64_t c = 0; c < channels; c += kSums / V)
            planes<S, V>(tiles + x / 2, weights + c, c0 + c,
                         {at + c * plane, plane, channels - c, length - x, width, column});
        }
      };
      if constexpr (kVectors == 2) convolve.template operator()<2>();
      convolve.template operator()<1>();
    }
  }

  // `length` pixels from (h, w) on, side by side in y, of more than kFewChannels and at most kJoined channels.
  template <class S>
  void convolve_joined(const T* tiles, const T* weights, int64_t b, int64_t h, int64_t w, int64_t length) const {
    if constexpr (kJoined > kFewChannels) {
      const int64_t first = ((b * p.out_h + h) * p.out_w + w) * p.cout;
      int64_t x = 0;
      const auto convolve = [&]<int V>() {
        constexpr int kPixels = 2 * V * L;
        T planes[(kJoined + kSums) * kPixels], line[kJoined * L];
        for (; length - x > kPixels - 2 * L; x += kPixels) {
          for (int64_t c = 0; c < p.cout; c += kSums / V)
            plane_sums<V>(tiles + x / 2, weights + c, c, p.cout - c, planes + c * kPixels);
          for (int64_t k = 0; k < min<int64_t>(kPixels, length - x); k += L) {
            Vec<T> y[kJoined];
            for (int64_t c = 0; c < p.cout; ++c) y[c] = load(planes + c * kPixels + k);
            unrolled<kJoined - kFewChannels>([&]<int i>() {
              constexpr int n = kFewChannels + 1 + i;
              if (p.cout == n) join<n>(y, line);
            });
            finish_run<S>(p, line, first + (x + k) * p.cout, min<int64_t>(L, length - x - k) * p.cout);
          }
        }
      };
      if constexpr (kVectors == 2) convolve.template operator()<2>();
      convolve.template operator()<1>();
    }
  }

  static constexpr int64_t kEndless = INT64_MAX;

  // Where in y a block goes: n runs, `step` apart, each of so many elements. Behind every `width` of them, counted from
  // `column`, comes one that is not in y.
  struct Block {
    int64_t first, step, n, elements, width = kEndless, column = 0;
  };

  // V vectors of channels from c on of `to.n` pixels.
  template <class S, int V>
  void pixels(const T* x, const T* u, int64_t c, const Block& to) const {
    constexpr int R = kSums / V;
    Vec<T> bias[V];
    UNROLL(2) for (int v = 0; v < V; ++v) bias[v] = channel_map<T>(p, c + v * L, to.elements - v * L).shift;
    for (int64_t k = 0; k < to.n; k += 2 * R)
      block_of_pixels<S, V>(x + k / 2, u, bias, {to.first + k * to.step, to.step, to.n - k, to.elements});
  }

  template <class S, int V>
  NOINLINE void block_of_pixels(const T* x, const T* u, const Vec<T> (&bias)[V], const Block& to) const {
    constexpr int R = kSums / V;
    Vec<T> m[kProductsOfTile][R][V];
    each<R, V>([&](int i, int v) __attribute__((always_inline)) {
      m[0][i][v] = m[2][i][v] = m[3][i][v] = Vec<T>{}, m[1][i][v] = bias[v];
    });
    for_rows(x, [&](const T* tiles) __attribute__((always_inline)) {
      UNROLL(4) for (int i = 0; i < kProductsOfTile; ++i, u += kPanel) add(u, tiles + i * input.plane, m[i]);
    });
    Vec<T> y[2 * R][V];
    each<R, V>([&](int i, int v) __attribute__((always_inline)) {
      y[2 * i][v] = m[0][i][v] + m[1][i][v] + m[2][i][v];
      y[2 * i + 1][v] = m[1][i][v] - m[2][i][v] - m[3][i][v];
    });
    finish<S>(to, y);
  }

  // V vectors of tiles of kSums / V channels from c on, as y has them.
  template <class S, int V>
  NOINLINE void planes(const T* x, const T* u, int64_t c, const Block& to) const {
    Vec<T> y[kSums / V][2 * V];
    multiply_planes<V>(x, u, c, to.n, y);
    finish<S>(to, y);
  }

  // The same into memory, [channel][pixel].
  template <int V>
  NOINLINE void plane_sums(const T* x, const T* u, int64_t c, int64_t n, T* to) const {
    Vec<T> y[kSums / V][2 * V];
    multiply_planes<V>(x, u, c, n, y);
    each<kSums / V, 2 * V>([&](int i, int v)
                               __attribute__((always_inline)) { store(to + (2 * V * i + v) * L, y[i][v]); });
  }

  // The same, of n channels left.
  template <int V>
  INLINE void multiply_planes(const T* x, const T* u, int64_t c, int64_t n, Vec<T> (&y)[kSums / V][2 * V]) const {
    constexpr int R = kSums / V;
    Vec<T> bias[(R + L - 1) / L];
    UNROLL(2) for (int i = 0; i < R; i += L) bias[i / L] = channel_map<T>(p, c + i, n - i).shift;
    Vec<T> m[kProductsOfTile][R][V];
    each<R, V>([&](int i, int v) __attribute__((always_inline)) {
      m[0][i][v] = m[2][i][v] = m[3][i][v] = Vec<T>{}, m[1][i][v] = broadcast(bias[i / L][i % L]);
    });
    for_rows(x, [&](const T* tiles) __attribute__((always_inline)) {
      UNROLL(4) for (int i = 0; i < kProductsOfTile; ++i, u += kPanel) add(tiles + i * input.plane, u, m[i]);
    });
    each<R, V>([&](int i, int v) __attribute__((always_inline)) {
      const Vec<T> even = m[0][i][v] + m[1][i][v] + m[2][i][v], odd = m[1][i][v] - m[2][i][v] - m[3][i][v];
      constexpr std::make_index_sequence<L> lanes;
      y[i][2 * v] = by_turns<2, 0, 1>(even, odd, lanes), y[i][2 * v + 1] = by_turns<2, 1, 1>(even, odd, lanes);
    });
  }

  // f(tiles) of every row that the kernel reads, of every channel.
  template <class F>
  INLINE void for_rows(const T* x, const F& f) const {
    const int64_t next_channel = kProductsOfTile * input.plane - 3 * input.tiles;
    for (int64_t c = 0; c < p.cin; ++c, x += next_channel)
      UNROLL(1) for (int row = 0; row < 3; ++row, x += input.tiles) f(x);
  }

  // f(i, v) of every vector of a block, each by itself so that they stay in registers.
  template <int R, int V, class F>
  static INLINE void each(const F& f) {
    UNROLL(12) for (int i = 0; i < R; ++i) UNROLL(4) for (int v = 0; v < V; ++v) f(i, v);
  }

  template <int R, int V>
  static INLINE void add(const T* vectors, const T* shared, Vec<T> (&m)[R][V]) {
    Vec<T> u[V];
    UNROLL(2) for (int v = 0; v < V; ++v) u[v] = load(vectors + v * L);
    each<R, V>([&](int i, int v) __attribute__((always_inline)) { m[i][v] += u[v] * shared[i]; });
  }

  // Adds the residual, activates and stores: from the registers where there is nothing to do but store.
  template <class S, int R, int V>
  INLINE void finish(const Block& to, Vec<T> (&y)[R][V]) const {
    const bool whole = to.elements >= V * L, streamed = whole && is_streamed<S>(p);
    const bool stored = !p.residual && p.activation == Activation::linear && to.width == kEndless;
    if (!stored || !(whole || sizeof(S) == sizeof(T))) {
      Vec<T> part[R][V];
      each<R, V>([&](int i, int v) __attribute__((always_inline)) { part[i][v] = y[i][v]; });
      return finish_part<S>(to, &part[0][0], min<int64_t>(R, to.n), V, streamed);
    }
    S* const first = static_cast<S*>(p.y) + to.first;
    // What the next block will write: up to a fifth of the time where its lines are in no cache.
    const int64_t next = p.y_channels_last ? R * to.step : V * L;
    each<R, V>([&](int i, int v) __attribute__((always_inline)) {
      if (i >= to.n) return;
      S* const at = first + i * to.step + v * L;
      whole ? store(at, y[i][v], streamed) : store(at, y[i][v], max<int64_t>(0, to.elements - v * L));
      if (!streamed) __builtin_prefetch(at + next, 1, 3);
    });
  }

  // Through memory: runs of so many vectors.
  template <class S>
  NOINLINE void finish_part(const Block& to, Vec<T>* y, int runs, int vectors, bool streamed) const {
    if (p.residual)
      for_pieces(to, y, runs, vectors, [&](int64_t at, T* v, int64_t n) {
        store(v, load(v, n) + load(static_cast<const S*>(p.residual) + at, n), n);
      });
    if (p.activation != Activation::linear) activate_all<T>(p.activation, y, runs * vectors);
    const int64_t next = p.y_channels_last ? runs * to.step : vectors * L;
    for_pieces(to, y, runs, vectors, [&](int64_t at, const T* v, int64_t n) {
      S* const address = static_cast<S*>(p.y) + at;
      n == L ? store(address, load(v), streamed) : store(address, load(v, n), n);
      if (!streamed) __builtin_prefetch(address + next, 1, 3);
    });
  }

  // f(element of y, first lane, lanes) of every piece of a block that lies side by side there.
  template <class F>
  void for_pieces(const Block& to, Vec<T>* y, int runs, int vectors, const F& f) const {
    const int64_t elements = min<int64_t>(to.elements, vectors * L);
    T* const v = reinterpret_cast<T*>(y);
    int64_t at = to.first, column = to.column;
    for (int64_t k = 0, n; k < elements; k += n, at += n, column += n) {
      if (column == to.width) column = 0, ++k;
      n = max<int64_t>(0, min(min<int64_t>(L - k % L, elements - k), to.width - column));
      for (int i = 0; i < runs; ++i) f(at + i * to.step, v + i * vectors * L + k, n);
    }
  }
};

inline void few_inputs(const ProductConvParams& p, const PackWeightParams& w) {
  if constexpr (kVectorBytes == 16)
    if (p.dtype == Dtype::f64) return FewInputs<double>(p).run(w);
  FewInputs<float>(p).run(w);
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
