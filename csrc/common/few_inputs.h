// Convolution 3x3 of few input channels (images, latents), where transforms would cost more than they save: directly,
// nine products for each channel, with the sums of a block of outputs in registers from the first product to the last.
#pragma once
#include "product_conv.h"

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// A band of the input in the caches, planar.
template <class T>
class InputStage {
  static constexpr int L = kLanes<T>;

  const ProductConvParams& p;

 public:
  static constexpr int64_t kColumns = 8 * L;       // a stage this wide,
  static constexpr int64_t kBytes = 512 << 10;     // and this many bytes large, stays in the cache
  static constexpr int64_t kWidth = kColumns + L;  // one column of halo on each side, whole vectors
  const int64_t rows;                              // of input, without the halo

  explicit InputStage(const ProductConvParams& p)
      : p(p), rows(max<int64_t>(1, min<int64_t>(8, kBytes / (p.cin * kWidth * int64_t{sizeof(T)} + 1) - 2))) {}

  int64_t plane() const { return (rows + 2) * kWidth; }

  // stage[channel][row][column] = the input around the band, with one pixel of halo, zero outside the image.
  void fill(T* stage, int64_t b, int64_t h0, int64_t w0, int64_t height, int64_t width) const {
    dispatch_dtype<T>(p.dtype, [&]<class S>() { fill<S>(stage, b, h0, w0, height, width); });
  }

 private:
  template <class S>
  void fill(T* stage, int64_t b, int64_t h0, int64_t w0, int64_t height, int64_t width) const {
    const S* image = static_cast<const S*>(p.x) + b * p.x_stride[0];
    const int64_t first = max<int64_t>(0, w0 - 1), last = min(p.in_w, w0 + width + 1);
    for (int64_t i = 0; i < height + 2; ++i) {
      const int64_t h = h0 + i - 1;
      const bool inside = h >= 0 && h < p.in_h;
      T* const to = stage + i * kWidth;
      for (int64_t c = 0; c < p.cin; ++c)
        if (!inside || w0 == 0 || last < w0 + width + 1) std::memset(to + c * plane(), 0, kWidth * sizeof(T));
      if (!inside) continue;
      const S* row = image + h * p.x_stride[2];
      p.x_stride[1] == 1 ? fill_channels_last(to, row, w0, first, last) : fill_planar(to, row, w0, first, last);
      if (image_view(p).is_mapped()) map(to, b, w0, first, last);
    }
  }

  template <class S>
  void fill_channels_last(T* to, const S* row, int64_t w0, int64_t first, int64_t last) const {
    for (int64_t c = 0; c < p.cin; c += L)
      for (int64_t w = first; w < last; w += L) {
        const int64_t n = min<int64_t>(L, last - w);
        Vec<T> r[L];
        for (int k = 0; k < L; ++k) r[k] = k < n ? load(row + (w + k) * p.x_stride[3] + c, p.cin - c) : Vec<T>{};
        transpose<T>(r);
        for (int k = 0; k < min<int64_t>(L, p.cin - c); ++k) store(to + (c + k) * plane() + w - w0 + 1, r[k], n);
      }
  }

  template <class S>
  void fill_planar(T* to, const S* row, int64_t w0, int64_t first, int64_t last) const {
    for (int64_t c = 0; c < p.cin; ++c) {
      const S* from = row + c * p.x_stride[1];
      for (int64_t w = first; w < last; w += L) {
        S part[L];
        const S* x = from + w;
        const int64_t n = min<int64_t>(L, last - w);
        if (p.x_stride[3] != 1) {
          for (int64_t k = 0; k < n; ++k) part[k] = from[(w + k) * p.x_stride[3]];
          x = part;
        }
        store(to + c * plane() + w - w0 + 1, load(x, n), n);
      }
    }
  }

  // x_activation(x * x_scale + x_shift) of what was filled.
  void map(T* to, int64_t b, int64_t w0, int64_t first, int64_t last) const {
    dispatch_activation(p.x_activation, [&]<Activation A>() {
      for (int64_t c = 0; c < p.cin; ++c) {
        const int64_t channel = b * p.cin + c;
        const T scale = p.x_scale ? static_cast<const T*>(p.x_scale)[channel] : T(1);
        const T shift = p.x_shift ? static_cast<const T*>(p.x_shift)[channel] : T(0);
        T* const row = to + c * plane() - w0 + 1;
        for (int64_t w = first; w < last; w += L)
          store(row + w, activate<A, T>(load(row + w, last - w) * scale + shift), last - w);
      }
    });
  }
};

// Lanes are output channels in channels_last and pixels in planes, so that every vector is stored as it is.
template <class T>
class FewInputs {
  static constexpr int L = kLanes<T>, kPanel = kPanelVectors * L;
  // Pixels, or output channels, that share what is loaded of the other side: with two vectors two thirds of the
  // registers, and a divisor of most widths.
  static constexpr int kSharing = kVectorBytes == 64 ? 8 : 4;
  static constexpr int64_t kColumns = InputStage<T>::kColumns, kWidth = InputStage<T>::kWidth;

  const ProductConvParams& p;
  const InputStage<T> input;
  const int64_t panels;

 public:
  explicit FewInputs(const ProductConvParams& p) : p(p), input(p), panels(ceil_div(p.cout, kPanel)) {}

  void run(const PackWeightParams& w) const {
    const int64_t share = ceil_div(p.batch * p.out_h, 4 * num_threads());  // four bands or more for every thread
    const int64_t rows = min(input.rows, share), bands = ceil_div(p.out_h, rows), columns = ceil_div(p.out_w, kColumns);
    const int64_t items = p.batch * bands * columns;
    const size_t bytes = panels * 9 * p.cin * kPanel * sizeof(T);
    T* const weights = static_cast<T*>(allocate(bytes));
    order(w, weights);
    parallel_claim(items, [&](const auto& claim) {
      T* const stage = static_cast<T*>(workspace((p.cin * input.plane() + kPanel) * sizeof(T)));
      for (int64_t item; (item = claim()) < items;) {
        const int64_t b = item / (bands * columns), h0 = item / columns % bands * rows, w0 = item % columns * kColumns;
        const int64_t height = min(rows, p.out_h - h0), width = min(kColumns, p.out_w - w0);
        input.fill(stage, b, h0, w0, height, width);
        dispatch_dtype<T>(p.dtype, [&]<class S>() {
          p.y_channels_last ? convolve_pixels<S>(stage, weights, b, h0, w0, height, width)
                            : convolve_planes<S>(stage, weights, b, h0, w0, height, width);
        });
      }
      finish_streams();
    });
    release(weights, bytes);
  }

 private:
  // [panel][cin][tap][kPanel]; what lies behind the last channel is zero.
  void order(const PackWeightParams& w, T* to) const {
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t ci = 0; ci < p.cin; ++ci, to += 9 * kPanel)
        for (int v = 0; v < kPanelVectors; ++v) {
          const int64_t co = panel * kPanel + v * L, n = max<int64_t>(0, min<int64_t>(L, p.cout - co));
          T taps[9][L] = {};
          dispatch_dtype<T>(p.dtype, [&]<class S>() { gather_taps<S, 3, T>(w, co, ci, n, taps); });
          for (int tap = 0; tap < 9; ++tap) store(to + tap * kPanel + v * L, load(taps[tap]));
        }
  }

  template <class S>
  void convolve_pixels(const T* stage, const T* weights, int64_t b, int64_t h0, int64_t w0, int64_t height,
                       int64_t width) const {
    for (int64_t h = 0; h < height; ++h)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t channels = min<int64_t>(kPanel, p.cout - panel * kPanel);
        const T* const w = weights + panel * 9 * p.cin * kPanel;
        const int64_t first = ((b * p.out_h + h0 + h) * p.out_w + w0) * p.cout + panel * kPanel;
        for (int64_t x = 0; x < width; x += kSharing) {
          const int64_t n = min<int64_t>(kSharing, width - x);
          const Block to{first + x * p.cout, p.cout, n, L, {min<int64_t>(L, channels), channels - L}};
          channels > L ? pixels<S, 2>(stage + h * kWidth + x, w, panel * kPanel, to)
                       : pixels<S, 1>(stage + h * kWidth + x, w, panel * kPanel, to);
        }
      }
  }

  // Two vectors are neighbours in a row, or in a column where rows are shorter than a vector.
  template <class S>
  void convolve_planes(const T* stage, const T* weights, int64_t b, int64_t h0, int64_t w0, int64_t height,
                       int64_t width) const {
    const bool narrow = width <= L;
    for (int64_t c = 0; c < p.cout; c += kSharing) {
      const T* const w = weights + c / kPanel * 9 * p.cin * kPanel + c % kPanel;
      const int64_t channels = min<int64_t>(kSharing, p.cout - c);
      for (int64_t h = 0; h < height; h += narrow ? 2 : 1)
        for (int64_t x = 0; x < width; x += 2 * L) {
          const T* const from = stage + h * kWidth + x;
          const int64_t first = ((b * p.cout + c) * p.out_h + h0 + h) * p.out_w + w0 + x, n = width - x;
          if (narrow && h + 1 < height)
            planes<S, 2>(from, kWidth, w, c, {first, p.out_h * p.out_w, channels, p.out_w, {n, n}});
          else if (n > L)
            planes<S, 2>(from, L, w, c, {first, p.out_h * p.out_w, channels, L, {L, n - L}});
          else
            planes<S, 1>(from, L, w, c, {first, p.out_h * p.out_w, channels, L, {n, 0}});
        }
    }
  }

  // Where in y a block of vectors goes: n of them, `step` elements apart, and again `next` elements further on, with so
  // many elements each.
  struct Block {
    int64_t first, step, n, next, lanes[2];
  };

  // V vectors of channels from c on of some pixels.
  template <class S, int V>
  NOINLINE void pixels(const T* x, const T* w, int64_t c, const Block& to) const {
    Vec<T> y[kSharing][V];
    each<V>([&](int i, int v) __attribute__((always_inline)) { y[i][v] = Vec<T>{}; });
    for_taps(x, w, [&](const T* pixel, const T* weight) __attribute__((always_inline)) { add(weight, L, pixel, y); });
    ChannelMap<T> map[V];
    UNROLL(2) for (int v = 0; v < V; ++v) map[v] = channel_map<T>(p, c + v * L, to.lanes[v]);
    each<V>([&](int i, int v) __attribute__((always_inline)) { y[i][v] = y[i][v] * map[v].scale + map[v].shift; });
    finish<S>(to, y);
  }

  // V vectors of pixels, `next` elements apart, of some channels from c on.
  template <class S, int V>
  NOINLINE void planes(const T* x, int64_t next, const T* w, int64_t c, const Block& to) const {
    Vec<T> y[kSharing][V];
    each<V>([&](int i, int v) __attribute__((always_inline)) { y[i][v] = Vec<T>{}; });
    for_taps(x, w,
             [&](const T* pixel, const T* weight) __attribute__((always_inline)) { add(pixel, next, weight, y); });
    ChannelMap<T> map[(kSharing + L - 1) / L];
    UNROLL(4) for (int i = 0; i < kSharing; i += L) map[i / L] = channel_map<T>(p, c + i, to.n - i);
    each<V>([&](int i, int v) __attribute__((always_inline)) {
      y[i][v] = y[i][v] * map[i / L].scale[i % L] + map[i / L].shift[i % L];
    });
    finish<S>(to, y);
  }

  // f(i, v) of every vector of a block of outputs, each by itself so that they stay in registers.
  template <int V, class F>
  static INLINE void each(const F& f) {
    UNROLL(8) for (int i = 0; i < kSharing; ++i) UNROLL(2) for (int v = 0; v < V; ++v) f(i, v);
  }

  // f(first pixel, first weight) of every product that a block of outputs sums.
  template <class F>
  INLINE void for_taps(const T* x, const T* w, const F& f) const {
    for (int64_t c = 0; c < p.cin; ++c, x += input.plane(), w += 9 * kPanel)
      UNROLL(9) for (int tap = 0; tap < 9; ++tap) f(x + tap / 3 * kWidth + tap % 3, w + tap * kPanel);
  }

  template <int V>
  static INLINE void add(const T* vectors, int64_t next, const T* shared, Vec<T> (&y)[kSharing][V]) {
    Vec<T> u[V];
    UNROLL(2) for (int v = 0; v < V; ++v) u[v] = load(vectors + v * next);
    each<V>([&](int i, int v) __attribute__((always_inline)) { y[i][v] += u[v] * shared[i]; });
  }

  // Adds the residual, activates and stores.
  template <class S, int V>
  INLINE void finish(const Block& to, Vec<T> (&y)[kSharing][V]) const {
    S* const first = static_cast<S*>(p.y) + to.first;
    const bool streamed = is_streamed<S>(p), whole = to.lanes[0] == L && (V == 1 || to.lanes[V - 1] == L);
    // The pixels that the next block will write: up to a fifth of the time where their lines are in no cache.
    const bool prefetched = p.y_channels_last && !streamed;
    if (!p.residual && p.activation == Activation::linear && to.n == kSharing && (whole || sizeof(S) == sizeof(T))) {
      each<V>([&](int i, int v) __attribute__((always_inline)) {
        S* const at = first + i * to.step + v * to.next;
        whole ? store(at, y[i][v], streamed) : store(at, y[i][v], to.lanes[v]);
        if (prefetched) __builtin_prefetch(at + kSharing * to.step, 1, 3);
      });
      return;
    }
    Vec<T> part[kSharing][V];
    each<V>([&](int i, int v) __attribute__((always_inline)) { part[i][v] = y[i][v]; });
    finish_part<S>(to, &part[0][0], V, whole && streamed);
  }

  template <class S>
  NOINLINE void finish_part(const Block& to, Vec<T>* y, int vectors, bool streamed) const {
    const auto each = [&](const auto& f) {
      for (int64_t i = 0; i < to.n; ++i)
        for (int v = 0; v < vectors; ++v) f(to.first + i * to.step + v * to.next, y[i * vectors + v], to.lanes[v]);
    };
    if (p.residual)
      each([&](int64_t at, Vec<T>& v, int64_t n) { v += load(static_cast<const S*>(p.residual) + at, n); });
    if (p.activation != Activation::linear) activate_all<T>(p.activation, y, to.n * vectors);
    each([&](int64_t at, const Vec<T>& v, int64_t n) {
      S* const address = static_cast<S*>(p.y) + at;
      streamed ? store(address, v, true) : store(address, v, n);
    });
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
