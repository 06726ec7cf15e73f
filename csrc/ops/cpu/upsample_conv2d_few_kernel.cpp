// upsample_conv2d for up to four output channels (images, masks), where panels of 32 would be mostly empty: lanes are
// pixels, and the upsampling is folded into four 2x2 convolutions, one for each parity of output row and column.
#include "common/product_conv.h"
#include "ops/upsample_conv2d_products.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <class S, int kCout>
class FewChannels {
  using T = Compute<S>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kColumns = 8 * L;       // a stage of input this wide,
  static constexpr int64_t kStage = 512 << 10;     // and this many bytes large, stays in the second-level cache
  static constexpr int64_t kWidth = kColumns + L;  // one column of halo on each side, whole vectors

  const ProductConvParams& p;
  const int64_t rows;  // of input in a stage, without the halo

 public:
  explicit FewChannels(const ProductConvParams& p)
      : p(p), rows(max<int64_t>(1, min<int64_t>(8, kStage / (p.cin * kWidth * int64_t{sizeof(T)} + 1) - 2))) {}

  void run(const PackWeightParams& w) const {
    const int64_t bands = ceil_div(p.in_h, rows), columns = ceil_div(p.in_w, kColumns);
    const size_t bytes = p.cin * kCout * 16 * sizeof(T);
    T* const weights = static_cast<T*>(allocate(bytes));
    fold(w, weights);
    const int64_t items = p.batch * bands * columns;
    parallel_claim(items, [&](const auto& claim) {
      T* const stage = static_cast<T*>(workspace(p.cin * (rows + 2) * kWidth * sizeof(T)));
      for (int64_t item; (item = claim()) < items;) {
        const int64_t b = item / (bands * columns), h0 = item / columns % bands * rows, w0 = item % columns * kColumns;
        const int64_t height = min(rows, p.in_h - h0), width = min(kColumns, p.in_w - w0);
        fill(stage, b, h0, w0, height, width);
        for (int64_t h = 0; h < height; ++h)
          for (int64_t x = 0; x < width; x += L)
            convolve(stage + h * kWidth + x, weights, b, h0 + h, w0 + x, min<int64_t>(L, width - x));
      }
    });
    release(weights, bytes);
  }

 private:
  // [cin][cout][parity of row][of column][row of 2][column of 2]: sums of the weights that meet the same pixel.
  void fold(const PackWeightParams& w, T* to) const {
    constexpr int taps[2][2][3] = {{{1, 0, 0}, {0, 1, 1}}, {{1, 1, 0}, {0, 0, 1}}};  // [parity][pixel of 2]
    for (int64_t ci = 0; ci < p.cin; ++ci)
      for (int64_t co = 0; co < kCout; ++co) {
        const S* from = static_cast<const S*>(w.w) + co * w.w_stride[0] + ci * w.w_stride[1];
        for (int i = 0; i < 16; ++i) {
          T sum = 0;
          for (int a = 0; a < 3; ++a)
            for (int b = 0; b < 3; ++b)
              if (taps[i >> 3][i >> 1 & 1][a] && taps[i >> 2 & 1][i & 1][b])
                sum += to_compute(from[a * w.w_stride[2] + b * w.w_stride[3]]);
          *to++ = sum;
        }
      }
  }

  // stage[channel][row][column] = the input around the band, with one pixel of halo, zero outside the image.
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
    }
  }

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

  int64_t plane() const { return (rows + 2) * kWidth; }

  // Four output pixels of every channel for each of n input pixels in a row.
  void convolve(const T* stage, const T* weights, int64_t b, int64_t h, int64_t w, int64_t n) const {
    Vec<T> y[kCout][2][2] = {};
    for (int64_t c = 0; c < p.cin; ++c, stage += plane()) {
      Vec<T> x[3][3];
      UNROLL(3)
      for (int i = 0; i < 3; ++i) UNROLL(3) for (int j = 0; j < 3; ++j) x[i][j] = load(stage + i * kWidth + j);
      UNROLL(4)
      for (int co = 0; co < kCout; ++co, weights += 16) UNROLL(16)
      for (int i = 0; i < 16; ++i)
        y[co][i >> 3][i >> 2 & 1] += x[(i >> 3) + (i >> 1 & 1)][(i >> 2 & 1) + (i & 1)] * weights[i];
    }
    for (int co = 0; co < kCout; ++co) {
      const T bias = p.bias ? to_compute(static_cast<const S*>(p.bias)[co]) : T(0);
      UNROLL(4) for (int i = 0; i < 4; ++i) y[co][i >> 1][i & 1] += bias;
      activate_all<T>(p.activation, &y[co][0][0], 4);
      const int64_t channel = p.y_channels_last ? 1 : p.out_h * p.out_w, pixel = p.y_channels_last ? kCout : 1;
      for (int i = 0; i < 2; ++i) {
        S* to = static_cast<S*>(p.y) + b * kCout * p.out_h * p.out_w + co * channel +
                ((2 * h + i) * p.out_w + 2 * w) * pixel;
        for (int64_t k = 0; k < n; ++k, to += 2 * pixel) {
          to[0] = from_compute<S>(y[co][i][0][k]);
          to[pixel] = from_compute<S>(y[co][i][1][k]);
        }
      }
    }
  }
};

}  // namespace

void upsample_conv2d_few_kernel(const ProductConvParams& p, const PackWeightParams& w) {
  dispatch_dtype(p.dtype, [&]<class S>() {
    switch (p.cout) {
      case 1: return FewChannels<S, 1>(p).run(w);
      case 2: return FewChannels<S, 2>(p).run(w);
      case 3: return FewChannels<S, 3>(p).run(w);
      case 4: return FewChannels<S, 4>(p).run(w);
    }
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
