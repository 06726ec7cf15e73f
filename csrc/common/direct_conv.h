// What the direct convolutions share: how rows are dealt out, and the map of the input that they staged.
#pragma once
#include "product_conv.h"

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Bands of at most so many rows, four or more for every thread, since some are quicker than others; or several images
// at a time where they are small: what takes less than 3 us, a second thread is not woken for.
struct RowBands {
  static constexpr int64_t kGrain = 1 << 18;  // multiplications

  int64_t batch, height, rows, images, bands, items;

  RowBands(const ProductConvParams& p, int64_t height, int64_t most_rows, int64_t least_rows)
      : batch(p.batch), height(height) {
    const int64_t multiplications = p.batch * p.in_h * p.in_w * p.cin * p.cout * 9, threads = num_threads();
    const int64_t shares = threads == 1 ? 1 : max<int64_t>(1, min(4 * threads, multiplications / kGrain));
    const int64_t share = ceil_div(batch * height, shares);  // rows
    rows = ceil_div(height, ceil_div(height, min(most_rows, max(share, least_rows))));
    images = rows == height ? max<int64_t>(1, share / height) : 1;
    bands = ceil_div(height, rows);
    items = ceil_div(batch, images) * bands;
  }

  // f(b, h0, h1) for each band of an item.
  template <class F>
  void for_item(int64_t item, const F& f) const {
    const int64_t b0 = item / bands * images, h0 = item % bands * rows;
    for (int64_t b = b0; b < min(batch, b0 + images); ++b) f(b, h0, min(height, h0 + rows));
  }
};

// x_activation(x * x_scale + x_shift) of n pixels of image b: x[channel][pixel], channels `stride` apart.
template <class T>
void map_channels(const ProductConvParams& p, int64_t b, T* x, int64_t stride, int64_t n) {
  if (!image_view(p).is_mapped()) return;
  constexpr int L = kLanes<T>;
  dispatch_activation(p.x_activation, [&]<Activation A>() {
    for (int64_t c = 0; c < p.cin; ++c, x += stride) {
      const int64_t channel = b * p.cin + c;
      const T scale = p.x_scale ? static_cast<const T*>(p.x_scale)[channel] : T(1);
      const T shift = p.x_shift ? static_cast<const T*>(p.x_shift)[channel] : T(0);
      for (int64_t k = 0; k < n; k += L) store(x + k, activate<A, T>(load(x + k, n - k) * scale + shift), n - k);
    }
  });
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
