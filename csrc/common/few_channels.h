// Convolution to few output channels (images, masks), where panels of 32 would be mostly empty: lanes are pixels.
//
// Each input pixel has a block of kScale x kScale outputs; output a of a block reads kSpan pixels from a - 1 on, in
// each dimension with the sums of the weights that kTaps [a][pixel] marks. Every input pixel is multiplied by every
// weight first, once, and the outputs are sums of such products around them: pixels follow each other through the rows,
// so that no lane is idle however narrow the image, and upsampling takes 9 products where folded weights take 16.
#pragma once
#include "direct_conv.h"

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Neighbouring pixels of an image, [channel][pixel], in the second-level cache.
template <class T>
class PixelStage {
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kMost = 8 * L;  // pixels; more gain nothing

  const ProductConvParams& p;
  const bool dense;  // rows follow each other

 public:
  const int64_t pixels, stride;  // a line more than they take, lest channels meet in one cache set

  explicit PixelStage(const ProductConvParams& p)
      : p(p),
        dense(p.x_stride[2] == p.in_w * p.x_stride[3]),
        pixels(max<int64_t>(1, min<int64_t>(kMost, (256 << 10) / (p.cin * int64_t{sizeof(T)} + 1)) / L) * L),
        stride(pixels + L) {}

  int64_t bytes() const { return p.cin * stride * sizeof(T); }

  // stage[channel][k] = pixel first + k of image b, counted through its rows, for k < n.
  void fill(T* stage, int64_t b, int64_t first, int64_t n) const {
    const int64_t row = dense ? p.in_h * p.in_w : p.in_w;
    dispatch_dtype<T>(p.dtype, [&]<class S>() {
      const S* const image = static_cast<const S*>(p.x) + b * p.x_stride[0];
      for (int64_t k = 0; k < n;) {
        const int64_t h = (first + k) / row, w = (first + k) % row, length = min(n - k, row - w);
        const S* const from = image + h * p.x_stride[2] + w * p.x_stride[3];
        if (!split_channels(p, from, length, stage + k, stride)) fill_planar(stage + k, from, length);
        k += length;
      }
    });
    map_channels(p, b, stage, stride, n);
  }

 private:
  template <class S>
  void fill_planar(T* to, const S* from, int64_t n) const {
    constexpr int kAhead = 4;  // planes lie far apart, which no prefetcher foresees
    for (int64_t c = 0; c < p.cin; ++c, from += p.x_stride[1], to += stride)
      for (int64_t w = 0; w < n; w += L) {
        const S* x = from + w * p.x_stride[3];
        const int64_t count = min<int64_t>(L, n - w);
        S part[L] = {};
        if (p.x_stride[3] != 1) {
          for (int64_t k = 0; k < count; ++k) part[k] = x[k * p.x_stride[3]];
          x = part;
        } else if (c + kAhead < p.cin) {
          __builtin_prefetch(x + kAhead * p.x_stride[1], 0, 2);
        }
        store(to + w, load(x, count), count);
      }
  }
};

template <class Alg, class T, int kCout>
class FewChannels {
  static constexpr int L = kLanes<T>, kScale = Alg::kScale, kSpan = Alg::kSpan;
  static constexpr int kTaps = sizeof(Alg::kTaps[0][0]) / sizeof(int);
  // What a row of the kernel makes of a pixel, [tap][channel], for so many vectors of pixels at a time.
  static constexpr int kSums = kTaps * kCout;
  static constexpr int kVectors = kRows * kPanelVectors / kSums > 1 ? kRows * kPanelVectors / kSums : 1;

  const ProductConvParams& p;
  const PixelStage<T> input;
  const RowBands bands;  // of input, without their halos
  const int64_t plane;   // of products, what whole vectors reach

  // The first and the last row that a row of the kernel is multiplied with, from the first and the last of a band.
  static constexpr int first_offset(int tap) {
    for (int d = -1;; ++d)
      for (int a = 0; a < kScale; ++a)
        if (d - a + 1 >= 0 && d - a + 1 < kSpan && Alg::kTaps[a][d - a + 1][tap]) return d;
  }
  static constexpr int last_offset(int tap) {
    for (int d = 1;; --d)
      for (int a = 0; a < kScale; ++a)
        if (d - a + 1 >= 0 && d - a + 1 < kSpan && Alg::kTaps[a][d - a + 1][tap]) return d;
  }

 public:
  // Products of a band stay in the second-level cache beside the stage, and a band is of four rows or more, since halos
  // are read twice.
  explicit FewChannels(const ProductConvParams& p)
      : p(p),
        input(p),
        bands(p, ceil_div(p.out_h, kScale),
              max<int64_t>(1, (384 << 10) / (kTaps * kSums * p.in_w * int64_t{sizeof(T)}) - 2), 4),
        plane(round_up((bands.rows + 2) * p.in_w, L) + 3 * L) {}

  void run(const PackWeightParams& w) const {
    const size_t bytes = kTaps * kSums * p.cin * sizeof(T);
    T* const weights = static_cast<T*>(allocate(bytes));
    dispatch_dtype<T>(w.dtype, [&]<class S>() { order<S>(w, weights); });
    parallel_claim(bands.items, [&](const auto& claim) {
      T* const stage = static_cast<T*>(workspace(input.bytes() + kTaps * kSums * plane * sizeof(T)));
      T* const products = stage + p.cin * input.stride;
      for (int64_t item; (item = claim()) < bands.items;)
        bands.for_item(item, [&](int64_t b, int64_t h0, int64_t h1) {
          multiply(stage, weights, products, b, h0, h1);
          for (int64_t h = h0; h < h1; ++h)
            unrolled<kScale>([&]<int a>() {
              if (h * kScale + a < p.out_h) combine<a>(products, b, h0, h);
            });
        });
    });
    release(weights, bytes);
  }

 private:
  // [kernel row][cin][tap][cout]
  template <class S>
  void order(const PackWeightParams& w, T* to) const {
    for (int64_t co = 0; co < kCout; ++co)
      for (int64_t ci = 0; ci < p.cin; ++ci) {
        const S* const from = static_cast<const S*>(w.w) + co * w.w_stride[0] + ci * w.w_stride[1];
        for (int s = 0; s < kTaps; ++s)
          for (int t = 0; t < kTaps; ++t)
            to[(s * p.cin + ci) * kSums + t * kCout + co] = to_compute(from[s * w.w_stride[2] + t * w.w_stride[3]]);
      }
  }

  // products[kernel row][tap][cout][pixel], L elements on, for a band and the rows around it as far as they are read.
  void multiply(T* stage, const T* weights, T* products, int64_t b, int64_t h0, int64_t h1) const {
    const int64_t top = max<int64_t>(0, h0 - 1), bottom = min(p.in_h, h1 + 1), end = (bottom - top) * p.in_w;
    for (int64_t k = 0; k < end; k += input.pixels) {
      const int64_t n = min(input.pixels, end - k);
      input.fill(stage, b, top * p.in_w + k, n);
      unrolled<kTaps>([&]<int s>() {
        const int64_t from = max(k, (h0 + first_offset(s) - top) * p.in_w);
        const int64_t to = min(k + n, (h1 + last_offset(s) - top) * p.in_w);
        multiply<kVectors>(stage - k, weights + s * p.cin * kSums, products + s * kSums * plane + L, from, to);
      });
    }
  }

  // As many pixels at a time as are left. What is written behind the last is written again, or never read.
  template <int V>
  void multiply(const T* stage, const T* weights, T* products, int64_t k, int64_t end) const {
    for (; end - k > (V - 1) * L; k += V * L) multiply_pixels<V>(stage + k, weights, products + k);
    if constexpr (V > 1) multiply<V / 2>(stage, weights, products, k, end);
  }

  template <int V>
  NOINLINE void multiply_pixels(const T* x, const T* w, T* to) const {
    Vec<T> sums[kSums][V] = {};
    for (int64_t c = 0; c < p.cin; ++c, x += input.stride, w += kSums) UNROLL(16)
    for (int i = 0; i < kSums; ++i) UNROLL(8) for (int v = 0; v < V; ++v) sums[i][v] += load(x + v * L) * w[i];
    UNROLL(16)
    for (int i = 0; i < kSums; ++i) UNROLL(8) for (int v = 0; v < V; ++v) store(to + i * plane + v * L, sums[i][v]);
  }

  // Row a of the blocks of outputs in one row of input.
  template <int a>
  void combine(const T* products, int64_t b, int64_t h0, int64_t h) const {
    const int64_t pixel = p.y_channels_last ? kCout : 1, channel = p.y_channels_last ? 1 : p.out_h * p.out_w;
    const int64_t first = b * kCout * p.out_h * p.out_w + (h * kScale + a) * p.out_w * pixel;
    const T* const origin = products + L - max<int64_t>(0, h0 - 1) * p.in_w;
    ChannelMap<T> map[kCout];
    for (int co = 0; co < kCout; ++co) map[co] = channel_map<T>(p, co, 1);
    for (int64_t w = 0; w * kScale < p.out_w; w += L) {
      const int64_t n = min<int64_t>(kScale * L, p.out_w - w * kScale);
      Vec<T> y[kCout * kScale];
      for (int co = 0; co < kCout; ++co) {
        Vec<T> sums[kScale] = {};
        accumulate<a>(origin + co * plane, h, w, sums);
        for (int c = 0; c < kScale; ++c)
          y[p.y_channels_last ? c * kCout + co : co * kScale + c] = sums[c] * map[co].scale[0] + map[co].shift[0];
      }
      T line[kCout * kScale * L];  // as y has it
      if (p.y_channels_last)
        join<kCout * kScale>(y, line);
      else
        for (int co = 0; co < kCout; ++co) join<kScale>(y + co * kScale, line + co * kScale * L);
      dispatch_dtype<T>(p.dtype, [&]<class S>() {
        if (p.y_channels_last) return finish_run<S>(p, line, first + w * kScale * pixel, n * pixel);
        for (int co = 0; co < kCout; ++co)
          finish_run<S>(p, line + co * kScale * L, first + co * channel + w * kScale, n);
      });
    }
  }

  // The products that meet in output a of the blocks from w on, for each column of the block.
  template <int a>
  INLINE void accumulate(const T* products, int64_t h, int64_t w, Vec<T>* sums) const {
    using Lane = std::remove_reference_t<decltype(Bits<T>{}[0])>;
    Bits<T> lane;  // the column of each
    for (int k = 0; k < L; ++k) lane[k] = Lane(w + k);
    const Bits<T> has_left = lane > 0, has_right = lane < Lane(p.in_w - 1);
    const Bits<T> is_inside = lane < Lane(p.in_w);  // the last block of an odd transposed convolution is not
    unrolled<kSpan * kTaps>([&]<int r>() __attribute__((always_inline)) {
      constexpr int i = r / kTaps, s = r % kTaps, row = a + i - 1;
      if constexpr (Alg::kTaps[a][i][s]) {
        if (h + row < 0 || h + row >= p.in_h) return;
        const T* const from = products + s * kSums * plane + (h + row) * p.in_w + w;
        unrolled<kScale * kSpan * kTaps>([&]<int q>() __attribute__((always_inline)) {
          constexpr int c = q / (kSpan * kTaps), j = q / kTaps % kSpan, t = q % kTaps, column = c + j - 1;
          if constexpr (Alg::kTaps[c][j][t]) {
            const Vec<T> x = load(from + t * kCout * plane + column);
            if constexpr (column == 0 && kScale == 1)
              sums[c] += x;
            else
              sums[c] += select<T>(column < 0 ? has_left : column > 0 ? has_right : is_inside, x, Vec<T>{});
          }
        });
      }
    });
  }
};

template <class Alg>
void few_channels(const ProductConvParams& p, const PackWeightParams& w) {
  const auto run = [&]<class T>() {
    switch (p.cout) {
      case 1: return FewChannels<Alg, T, 1>(p).run(w);
      case 2: return FewChannels<Alg, T, 2>(p).run(w);
      case 3: return FewChannels<Alg, T, 3>(p).run(w);
      case 4: return FewChannels<Alg, T, 4>(p).run(w);
    }
  };
  if constexpr (kVectorBytes == 16)
    if (p.dtype == Dtype::f64) return run.template operator()<double>();
  run.template operator()<float>();
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
