// What is asked of a convolution, and the end of each: the sums mapped, the residual added, activated, stored.
#pragma once
#include <cstdint>

#include "activation.h"
#include "conv_algorithm.h"

namespace imagegen {

// y = act((conv(x_act(x * x_scale + x_shift)) + bias) * scale + shift + residual); what the convolution is, the
// algorithm says.
struct ProductConvParams {
  const void* x;
  int64_t x_stride[4];  // (B, C, H, W), any
  const void* x_scale;  // (B, C), contiguous, in the compute type, or null; then x_shift is null too
  const void* x_shift;
  Activation x_activation;
  const void* u;      // weights as pack_weight leaves them
  const void* bias;   // [cout] or null
  const void* scale;  // [cout], in the compute type, or null
  const void* shift;
  const void* residual;  // like y, or null
  void* y;               // (B, cout, out_h, out_w), contiguous or channels_last
  bool y_channels_last;
  Dtype dtype;
  Activation activation;
  int64_t batch, cin, cout, in_h, in_w, out_h, out_w;

  ConvShape shape() const { return {dtype, cin, cout, out_h, out_w}; }
};

}  // namespace imagegen

#ifdef IMAGEGEN_CAPABILITY
#include "tile_transform.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <class T>
NOINLINE void activate_all(Activation activation, Vec<T>* y, int n) {
  dispatch_activation(activation, [&]<Activation A>() {
    for (int i = 0; i < n; ++i) y[i] = activate<A, T>(y[i]);
  });
}

INLINE ImageView image_view(const ProductConvParams& p) {
  return {p.x,       p.dtype,   {p.x_stride[0], p.x_stride[1], p.x_stride[2], p.x_stride[3]},
          p.cin,     p.in_h,    p.in_w,
          p.x_scale, p.x_shift, p.x_activation};
}

// What is done to L channels of the sums, y = sums * scale + shift.
template <class T>
struct ChannelMap {
  Vec<T> scale = broadcast(T(1)), shift{};
};

template <class T>
INLINE ChannelMap<T> channel_map(const ProductConvParams& p, int64_t c, int64_t channels) {
  ChannelMap<T> map;
  if (p.bias)
    dispatch_dtype<T>(p.dtype, [&]<class S>() { map.shift = load(static_cast<const S*>(p.bias) + c, channels); });
  if (p.scale) {
    map.scale = load(static_cast<const T*>(p.scale) + c, channels);
    map.shift *= map.scale;
  }
  if (p.shift) map.shift += load(static_cast<const T*>(p.shift) + c, channels);
  return map;
}

// Large outputs of whole lines are written past the caches: in planes from 1 MB on, since lines of many planes are slow
// to come by (at 8 MB they would take a sixth of the time), in channels_last from 6 MB on. With a reader of all of it
// behind, that gains 2-12 % from 2 MB in planes. In half precision only planes are, a fifth of the time at 128
// channels, where runs of eight blocks are whole lines.
template <class S>
INLINE bool is_streamed(const ProductConvParams& p, int64_t block_size = 1) {
  constexpr int64_t kLine = 64 / sizeof(S);
  const int64_t bytes = (p.y_channels_last ? 6 : 1) << 20, run = p.y_channels_last ? p.cout : p.out_w;
  const bool whole = sizeof(S) == sizeof(Compute<S>) || (!p.y_channels_last && 8 * block_size % kLine == 0);
  return kVectorBytes == 64 && whole && run % kLine == 0 &&
         p.batch * p.cout * p.out_h * p.out_w * int64_t{sizeof(S)} >= bytes;
}

// A whole vector, past the caches if that is wanted and it is a line.
template <class S>
INLINE void store(S* to, Vec<Compute<S>> v, bool streamed) {
  if constexpr (sizeof(S) == sizeof(Compute<S>))
    if (streamed && reinterpret_cast<uintptr_t>(to) % 64 == 0) return stream(to, v);
  store(to, v);
}

// Half a line each of kLanes planes, kept until the other half comes.
template <class S, class T = Compute<S>>
struct HalfLines {
  static constexpr int L = kLanes<T>;
  alignas(64) S pixels[L][2 * L];
  bool held = false;

  // Takes r for the lines at `to`, `plane` elements apart, and says whether it did: no if they are not to be whole.
  INLINE bool take(const Vec<T>* r, S* to, int64_t plane, bool more) {
    if (!held && (reinterpret_cast<uintptr_t>(to) % 64 != 0 || !more)) return false;
    UNROLL(16) for (int k = 0; k < L; ++k) store(pixels[k] + (held ? L : 0), r[k]);
    for (int k = 0; held && k < L; ++k) {
      Vec<float> line;
      std::memcpy(&line, pixels[k], sizeof(line));
      stream(reinterpret_cast<float*>(to - L + k * plane), line);
    }
    held = !held;
    return true;
  }
};

// Both write sums of products, mapped already, as blocks of pixels: add the residual, activate, store.

// L channels of one block of kOut x kOut pixels, y[row][column], in channels_last.
template <class S, int kOut, class T = Compute<S>>
NOINLINE void store_pixels(const ProductConvParams& p, const TileGrid::Tile& at, int64_t c, int64_t channels,
                           Vec<T>* y) {
  const int64_t h0 = at.row * kOut, w0 = at.col * kOut;
  const int64_t first = ((at.b * p.out_h + h0) * p.out_w + w0) * p.cout + c;
  const int64_t rows = min<int64_t>(kOut, p.out_h - h0), cols = min<int64_t>(kOut, p.out_w - w0);
  const auto pixel = [&](int i, int j) { return first + (i * p.out_w + j) * p.cout; };
  if (p.residual) {
    const S* residual = static_cast<const S*>(p.residual);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < cols; ++j) y[i * kOut + j] += load(residual + pixel(i, j), channels);
  }
  if (p.activation != Activation::linear) activate_all<T>(p.activation, y, kOut * kOut);
  S* out = static_cast<S*>(p.y);
  if (rows == kOut && cols == kOut && channels >= kLanes<T>) {
    const bool streamed = is_streamed<S>(p), prefetched = !streamed && w0 + 2 * kOut <= p.out_w;
    UNROLL(4)
    for (int i = 0; i < kOut; ++i) UNROLL(4) for (int j = 0; j < kOut; ++j) {
        store(out + pixel(i, j), y[i * kOut + j], streamed);
        if (prefetched) __builtin_prefetch(out + pixel(i, j + kOut), 1, 3);  // what the next block will write
      }
    return;
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) store(out + pixel(i, j), y[i * kOut + j], channels);
}

// Asks for the lines of one block of a tensor like y, to be written or read. In planes every block of a row does so for
// those of some of the channels.
template <class S, int kOut, bool kWrite>
INLINE void prefetch_block(const ProductConvParams& p, const void* tensor, const TileGrid::Tile& at, int64_t c0,
                           int64_t channels) {
  if constexpr (kVectorBytes < 64) return;
  constexpr int kLine = 64 / sizeof(S), kSharing = kLine > kOut ? kLine / kOut : 1;  // blocks in a line
  const int64_t h0 = at.row * kOut, w0 = at.col * kOut, channel = p.out_h * p.out_w;
  const S* const image = static_cast<const S*>(tensor) + at.b * p.cout * channel;
  if (p.y_channels_last) {
    for (int i = 0; i < kOut; ++i)
      for (int64_t j = 0; j < kOut * p.cout; j += p.cout)
        for (int64_t c = c0; c < c0 + channels; c += kLine)
          __builtin_prefetch(image + ((h0 + i) * p.out_w + w0) * p.cout + j + c, kWrite, 2);
  } else {
    const S* const row = image + h0 * p.out_w + w0;
    for (int64_t c = c0 + at.col % kSharing; c < c0 + channels; c += kSharing)
      UNROLL(4) for (int i = 0; i < kOut; ++i) __builtin_prefetch(row + c * channel + i * p.out_w, kWrite, 2);
  }
}

// What comes between a sum and its output: n lines of at most L pixels, `plane` elements apart.
template <class S, class T = Compute<S>>
NOINLINE void finish_lines(const ProductConvParams& p, int64_t first, int64_t plane, int n, int64_t pixels, Vec<T>* r) {
  for (int k = 0; p.residual && k < n; ++k) r[k] += load(static_cast<const S*>(p.residual) + first + k * plane, pixels);
  if (p.activation != Activation::linear) activate_all<T>(p.activation, r, n);
}

// A run of `length` blocks in one row of blocks, [block_size rows][column][kPanel], turned into contiguous rows. What
// is less than L x L goes through memory, so that all else stays in registers.
template <class S, class T = Compute<S>>
NOINLINE void store_rows(const ProductConvParams& p, const T* outputs, int64_t block_size, const TileGrid::Tile& at,
                         int64_t length, int64_t c0, int64_t channels) {
  constexpr int L = kLanes<T>, kPanel = kPanelVectors * L;
  const int64_t h0 = at.row * block_size, w0 = at.col * block_size, columns = length * block_size;
  const int64_t width = min(columns, p.out_w - w0), plane = p.out_h * p.out_w;
  const bool streamed = is_streamed<S>(p, block_size);
  constexpr bool kHalves = kVectorBytes == 64 && 2 * L * sizeof(S) == 64;
  [[maybe_unused]] HalfLines<S> halves;
  for (int64_t i = 0; i < block_size && h0 + i < p.out_h; ++i)
    for (int64_t v = 0; v * L < channels; ++v)
      for (int64_t w = 0; w < width; w += L) {
        const T* const from = outputs + (i * columns + w) * kPanel + v * L;
        const int64_t first = (at.b * p.cout + c0 + v * L) * plane + (h0 + i) * p.out_w + w0 + w;
        S* const to = static_cast<S*>(p.y) + first;
        const int64_t pixels = min<int64_t>(L, width - w);
        const int n = min<int64_t>(L, channels - v * L);
        Vec<T> r[L], part[L] = {};
        if (pixels == L) {
          UNROLL(16) for (int k = 0; k < L; ++k) r[k] = load(from + k * kPanel);
        } else {
          for (int k = 0; k < pixels; ++k) part[k] = load(from + k * kPanel);
          std::memcpy(r, part, sizeof(r));
        }
        transpose<T>(r);
        if (p.residual || p.activation != Activation::linear) {
          std::memcpy(part, r, sizeof(r));
          finish_lines<S>(p, first, plane, n, pixels, part);
          std::memcpy(r, part, sizeof(r));
        }
        if (pixels == L && n == L) {
          if constexpr (kHalves)
            if (streamed && halves.take(r, to, plane, w + 2 * L <= width)) continue;
          UNROLL(16) for (int k = 0; k < L; ++k) store(to + k * plane, r[k], streamed);
        } else {
          std::memcpy(part, r, sizeof(r));
          for (int k = 0; k < n; ++k) store(to + k * plane, part[k], pixels);
        }
      }
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
