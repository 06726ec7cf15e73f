// What the direct convolutions share: how rows are dealt out, how channels that lie side by side are split into planes
// and joined again, the map of the input that they staged, and the end of a run of sums.
#pragma once
#include "product_conv.h"

namespace imagegen {

constexpr int64_t kFewChannels = 4;  // of output, to which convolutions are direct

}  // namespace imagegen

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

// Elements of a and b, counted through both.
template <class V, size_t... I>
INLINE V pick(V a, V b, std::index_sequence<I...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}
// Every n-th of vectors 0 to i from element `first` on: b is vector i, and a vector 0, or what this made of those
// before.
template <int n, int first, int i, class V, size_t... I>
INLINE V every_nth(V a, V b, std::index_sequence<I...>) {
  constexpr int L = sizeof...(I);
  return pick(a, b,
              std::index_sequence<((n * I + first) / L == i ? L + (n * I + first) % L
                                   : i == 1                 ? (n * I + first) % L
                                                            : I)...>());
}

// Channels that lie side by side, each to a row of its own.
template <int kCin, class S, class T>
void split(const S* x, int64_t n, T* to, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t w = 0; w < n; w += L) {
    Vec<T> v[kCin];
    for (int i = 0; i < kCin; ++i) v[i] = load(x + w * kCin + i * L, max<int64_t>(0, (n - w) * kCin - i * L));
    unrolled<kCin>([&]<int c>() {
      Vec<T> r = v[0];
      unrolled<kCin - 1>([&]<int i>() { r = every_nth<kCin, c, i + 1>(r, v[i + 1], std::make_index_sequence<L>()); });
      store(to + c * stride + w, r, n - w);
    });
  }
}
// The same of any number of channels, in squares.
template <class S, class T>
void split_many(const ProductConvParams& p, const S* pixels, int64_t n, T* to, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t w = 0; w < n; w += L)
    for (int64_t c = 0; c < p.cin; c += L) {
      const int64_t count = min<int64_t>(L, n - w), channels = p.cin - c;
      const S* const x = pixels + w * p.x_stride[3] + c;
      Vec<T> r[L];
      if (count == L && channels >= L) {
        UNROLL(16) for (int k = 0; k < L; ++k) r[k] = load(x + k * p.x_stride[3]);
        transpose<T>(r);
        UNROLL(16) for (int k = 0; k < L; ++k) store(to + (c + k) * stride + w, r[k]);
      } else if (count == L) {
        UNROLL(16) for (int k = 0; k < L; ++k) r[k] = load(x + k * p.x_stride[3], channels);
        transpose<T>(r);
        UNROLL(16) for (int k = 0; k < L; ++k) if (k < channels) store(to + (c + k) * stride + w, r[k]);
      } else {
        Vec<T> part[L] = {};
        for (int k = 0; k < count; ++k) part[k] = load(x + k * p.x_stride[3], channels);
        std::memcpy(r, part, sizeof(r));
        transpose<T>(r);
        std::memcpy(part, r, sizeof(r));
        for (int k = 0; k < min<int64_t>(L, channels); ++k) store(to + (c + k) * stride + w, part[k], count);
      }
    }
}
// Either for n pixels of x, if its channels lie side by side: up to half the time of a convolution to few channels.
template <class S, class T>
bool split_channels(const ProductConvParams& p, const S* x, int64_t n, T* to, int64_t stride) {
  if (p.x_stride[1] != 1 || p.cin == 1) return false;
  const bool dense = p.x_stride[3] == p.cin;
  if (dense && p.cin == 2)
    split<2>(x, n, to, stride);
  else if (dense && p.cin == 3)
    split<3>(x, n, to, stride);
  else if (dense && p.cin == 4)
    split<4>(x, n, to, stride);
  else
    split_many(p, x, n, to, stride);
  return true;
}

// Vector `part` of the elements of n vectors by turns, as far as vector i: b is vector i, and a vector 0, or what this
// made of those before.
template <int n, int part, int i, class V, size_t... I>
INLINE V by_turns(V a, V b, std::index_sequence<I...>) {
  constexpr int L = sizeof...(I);
  return pick(a, b,
              std::index_sequence<((part * L + I) % n == i ? L + (part * L + I) / n
                                   : i == 1                ? (part * L + I) / n
                                                           : I)...>());
}
// The elements of n vectors by turns.
template <int n, class T>
INLINE void join(const Vec<T>* v, T* to) {
  constexpr int L = kLanes<T>;
  unrolled<n>([&]<int part>() __attribute__((always_inline)) {
    Vec<T> r = v[0];
    unrolled<n - 1>([&]<int i>() __attribute__((always_inline)) {
      r = by_turns<n, part, i + 1>(r, v[i + 1], std::make_index_sequence<L>());
    });
    store(to + part * L, r);
  });
}

// n sums that lie side by side in y, from element `first` on: adds the residual, activates and stores.
template <class S, class T>
void finish_run(const ProductConvParams& p, const T* line, int64_t first, int64_t n) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < n; k += L) {
    Vec<T> y = load(line + k);
    if (p.residual) y += load(static_cast<const S*>(p.residual) + first + k, n - k);
    if (p.activation != Activation::linear) activate_all<T>(p.activation, &y, 1);
    store(static_cast<S*>(p.y) + first + k, y, n - k);
  }
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
