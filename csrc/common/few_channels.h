// Convolution to few output channels (images, masks), where panels of 32 would be mostly empty: lanes are pixels.
//
// Each input pixel has a block of kScale x kScale outputs; each of those reads kSpan x kSpan pixels around it, in each
// dimension with the sums of the weights that kTaps [output of the block][pixel] marks.
#pragma once
#include "product_conv.h"

namespace imagegen {

constexpr int64_t kFewChannels = 4;

}  // namespace imagegen

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// A band of the input in the second-level cache, where lanes are pixels.
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

template <class Alg, class T, int kCout>
class FewChannels {
  static constexpr int L = kLanes<T>, kScale = Alg::kScale, kSpan = Alg::kSpan;
  static constexpr int kWeights = kScale * kScale * kSpan * kSpan, kTaps = sizeof(Alg::kTaps[0][0]) / sizeof(int);
  // Vectors of pixels that are summed at a time: two multipliers of four cycles want eight sums in flight.
  static constexpr int64_t kVectors = kScale == 1 ? 2 : 1;
  static constexpr int64_t kColumns = InputStage<T>::kColumns, kWidth = InputStage<T>::kWidth;

  const ProductConvParams& p;
  const int64_t blocks_h, blocks_w;  // of output
  const InputStage<T> input;

 public:
  explicit FewChannels(const ProductConvParams& p)
      : p(p), blocks_h(ceil_div(p.out_h, kScale)), blocks_w(ceil_div(p.out_w, kScale)), input(p) {}

  void run(const PackWeightParams& w) const {
    const int64_t rows = input.rows, bands = ceil_div(blocks_h, rows), columns = ceil_div(blocks_w, kColumns);
    const size_t bytes = p.cin * kCout * kWeights * sizeof(T);
    T* const weights = static_cast<T*>(allocate(bytes));
    fold(w, weights);
    const int64_t items = p.batch * bands * columns;
    parallel_claim(items, [&](const auto& claim) {
      T* const stage = static_cast<T*>(workspace(p.cin * input.plane() * sizeof(T)));
      for (int64_t item; (item = claim()) < items;) {
        const int64_t b = item / (bands * columns), h0 = item / columns % bands * rows, w0 = item % columns * kColumns;
        const int64_t height = min(rows, blocks_h - h0), width = min(kColumns, blocks_w - w0);
        input.fill(stage, b, h0, w0, height, width);
        for (int64_t h = 0; h < height; ++h)
          for (int64_t x = 0; x < width; x += kVectors * L) {
            const int64_t n = min(kVectors * L, width - x);
            n > L ? convolve<kVectors>(stage + h * kWidth + x, weights, b, h0 + h, w0 + x, n)
                  : convolve<1>(stage + h * kWidth + x, weights, b, h0 + h, w0 + x, n);
          }
      }
    });
    release(weights, bytes);
  }

 private:
  // [cin][cout][row in the block of kScale][column][row of kSpan][column]: sums of the weights that meet the same
  // pixel.
  void fold(const PackWeightParams& w, T* to) const {
    const auto each = [](const auto& f) {
      for (int row = 0; row < kScale; ++row)
        for (int col = 0; col < kScale; ++col)
          for (int i = 0; i < kSpan; ++i)
            for (int j = 0; j < kSpan; ++j) f(Alg::kTaps[row][i], Alg::kTaps[col][j]);
    };
    for (int64_t ci = 0; ci < p.cin; ++ci)
      for (int64_t co = 0; co < kCout; ++co) {
        T taps[kTaps * kTaps][L];
        dispatch_dtype<T>(w.dtype, [&]<class S>() { gather_taps<S, kTaps, T>(w, co, ci, 1, taps); });
        each([&](const int (&rows)[kTaps], const int (&cols)[kTaps]) {
          T sum = 0;
          for (int a = 0; a < kTaps; ++a)
            for (int b = 0; b < kTaps; ++b)
              if (rows[a] && cols[b]) sum += taps[a * kTaps + b][0];
          *to++ = sum;
        });
      }
  }

  // The block of kScale x kScale output pixels of every channel for each of n <= V * L input pixels in a row.
  template <int V>
  void convolve(const T* stage, const T* weights, int64_t b, int64_t h, int64_t w, int64_t n) const {
    Vec<T> y[V][kCout][kScale][kScale] = {};
    for (int64_t c = 0; c < p.cin; ++c, stage += input.plane()) {
      Vec<T> x[V][3][3];
      UNROLL(2)
      for (int v = 0; v < V; ++v) UNROLL(3)
      for (int i = 0; i < 3; ++i)
        UNROLL(3) for (int j = 0; j < 3; ++j) x[v][i][j] = load(stage + i * kWidth + j + v * L);
      UNROLL(4)
      for (int co = 0; co < kCout; ++co, weights += kWeights) UNROLL(16)
      for (int i = 0; i < kWeights; ++i) {
        const int row = i / (kScale * kSpan * kSpan), col = i / (kSpan * kSpan) % kScale;
        UNROLL(2)
        for (int v = 0; v < V; ++v) y[v][co][row][col] += x[v][row + i / kSpan % kSpan][col + i % kSpan] * weights[i];
      }
    }
    dispatch_dtype<T>(p.dtype, [&]<class S>() {
      for (int v = 0; v < V; ++v)
        for (int co = 0; co < kCout; ++co) finish<S>(co, &y[v][co][0][0], b, h, w + v * L, min<int64_t>(L, n - v * L));
    });
  }

  template <class S>
  void finish(int co, Vec<T>* y, int64_t b, int64_t h, int64_t w, int64_t n) const {
    const ChannelMap<T> map = channel_map<T>(p, co, 1);
    const int64_t channel = p.y_channels_last ? 1 : p.out_h * p.out_w, pixel = p.y_channels_last ? kCout : 1;
    const int64_t corner = b * kCout * p.out_h * p.out_w + co * channel + (h * p.out_w + w) * kScale * pixel;
    const auto at = [&](int i, int64_t k) { return corner + (i / kScale * p.out_w + k * kScale + i % kScale) * pixel; };
    // Of the last block, what lies inside the output.
    const auto count = [&](int i) {
      return h * kScale + i / kScale < p.out_h ? min(n, ceil_div(p.out_w - i % kScale, kScale) - w) : 0;
    };
    for (int i = 0; i < kScale * kScale; ++i) {
      y[i] = y[i] * map.scale[0] + map.shift[0];
      for (int64_t k = 0; p.residual && k < count(i); ++k)
        y[i][k] += to_compute(static_cast<const S*>(p.residual)[at(i, k)]);
    }
    if (p.activation != Activation::linear) activate_all<T>(p.activation, y, kScale * kScale);
    S* const to = static_cast<S*>(p.y);
    if (kScale == 1 && pixel == 1) return store(to + at(0, 0), y[0], n);
    for (int i = 0; i < kScale * kScale; ++i)
      for (int64_t k = 0; k < count(i); ++k) to[at(i, k)] = from_compute<S>(y[i][k]);
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
