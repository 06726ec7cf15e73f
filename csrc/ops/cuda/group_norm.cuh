// What group_norm's kernels share: moments and sums and how they merge, the cuts, the coefficients of a channel.
//
// Statistics are of x - pivot, where pivot is a number near the group's mean: their rounding is that of the deviation,
// however far away the mean is. Each thread takes the mean of a few values, then the squares about that mean, and
// merges (Chan et al. 1979): nothing cancels. Everything is merged in an order that the shape alone decides.
#pragma once
#include "common/ceil_div.h"
#include "common/launch.cuh"
#include "common/moments.cuh"
#include "common/scalar.cuh"
#include "ops/group_norm.h"

namespace imagegen::cuda {

constexpr int kGroupNormThreads = 256;

// How a tensor is cut among blocks, by its shape alone, so that sums are the same on every GPU.
struct GroupNormCut {
  int width;       // elements a thread loads at a time: 16 bytes where they lie side by side, else one
  int team;        // threads beside each other: planar, along the pixels; channels innermost, along the channels
  int64_t slices;  // of the pixels of a plane, or of an image
  int64_t slice;   // pixels in one
  int64_t span;    // channels innermost: those of a block, of whole groups
  int64_t spans;   // of all channels
};

// The launchers of each layout; W and the rest of the kernel's template are chosen inside. Moments and sums lie in the
// workspace: of each group its parts side by side, of each channel its slices.
struct GroupNormWork {
  void* parts;
  int64_t parts_per_group;
  void* level_slope;  // [B, groups, 2]
  cudaStream_t stream;
};
namespace planar {
GroupNormCut cut(const GroupNormParams&, int width);
cudaError_t statistics(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
cudaError_t apply(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
cudaError_t gradient_sums(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
cudaError_t gradient(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
}  // namespace planar
namespace innermost {
GroupNormCut cut(const GroupNormParams&, int width);
cudaError_t statistics(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
cudaError_t apply(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
cudaError_t gradient_sums(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
cudaError_t gradient(const GroupNormParams&, const GroupNormCut&, const GroupNormWork&);
}  // namespace innermost

namespace {

constexpr int kThreads = kGroupNormThreads, kWarps = kThreads / 32;
constexpr int kUnroll = 4;  // loads a thread has under way at most

// W elements in one load or store.
template <class S, int W>
struct alignas(W * sizeof(S)) Values {
  S at[W];
};
template <int W, class S>
__device__ __forceinline__ Values<S, W> load_values(const S* p) {
  return *reinterpret_cast<const Values<S, W>*>(p);
}
template <int W, class S>
__device__ __forceinline__ void store_values(S* p, const Values<S, W>& v) {
  *reinterpret_cast<Values<S, W>*>(p) = v;
}

// Sums of dz and of dz * (x - mean).
template <class T>
struct Sums {
  T dz, dz_d;
};

template <class T>
__device__ __forceinline__ Sums<T> merge(const Sums<T>& a, const Sums<T>& b) {
  return {a.dz + b.dz, a.dz_d + b.dz_d};
}

template <class T>
__device__ __forceinline__ Sums<T> exchange(const Sums<T>& m, int from) {
  return {__shfl_sync(~0u, m.dz, from), __shfl_sync(~0u, m.dz_d, from)};
}

// M of all threads of a team, a power of two of neighbours, merged, for every one of them; within a warp no thread may
// be missing, and beyond 32 no thread of the block.
template <class M>
__device__ __forceinline__ M merge_team(M m, int team) {
  const int lane = threadIdx.x % 32, within = team < 32 ? team : 32;
  for (int step = within / 2; step > 0; step /= 2) m = merge(m, exchange(m, lane ^ step));
  m = exchange(m, lane / within * within);  // merging is not symmetric to the bit
  if (team <= 32) return m;
  __shared__ M of_warp[kWarps];
  __syncthreads();
  if (lane == 0) of_warp[threadIdx.x / 32] = m;
  __syncthreads();
  const int first = threadIdx.x / team * (team / 32);
  m = of_warp[first];
  for (int i = 1; i < team / 32; ++i) m = merge(m, of_warp[first + i]);
  return m;
}

// All parts of a group, for every thread of the team whose lane this is.
template <class T>
__device__ __forceinline__ Moments<T> merge_parts(const Moments<T>* parts, int64_t count, int lane, int team) {
  Moments<T> m{};
  for (int64_t i = lane; i < count; i += team) m = merge(m, parts[i]);
  return merge_team(m, team);
}

// Where pixel i lies from the first one of its plane.
template <bool kDense>
__device__ __forceinline__ int64_t pixel_offset(const GroupNormParams& p, const int64_t* stride, int64_t i) {
  if (kDense || p.dims == 1) return i * stride[0];
  int64_t offset = 0;
  for (int d = p.dims - 1; d >= 0; --d) {
    offset += i % p.size[d] * stride[d];
    i /= p.size[d];
  }
  return offset;
}

template <class S>
__device__ __forceinline__ const S* x_at(const GroupNormParams& p, int64_t b, int64_t c) {
  return static_cast<const S*>(p.x) + b * p.x_batch_stride + c * p.x_c_stride;
}
template <class S>
__device__ __forceinline__ const S* grad_at(const GroupNormParams& p, int64_t b, int64_t c) {
  return static_cast<const S*>(p.grad) + b * p.grad_batch_stride + c * p.grad_c_stride;
}

// The mean of eight values from all over the group.
template <class S, bool kDense = false>
__device__ __forceinline__ Compute<S> pivot_of(const GroupNormParams& p, int64_t b, int64_t g) {
  if (p.pixels == 0) return 0;
  const int64_t group_channels = p.channels / p.groups;
  Compute<S> sum = 0;
#pragma unroll(kDense ? 8 : 1)
  for (int i = 0; i < 8; ++i) {
    const int64_t c = g * group_channels + group_channels * i / 8;
    sum += to_compute(x_at<S>(p, b, c)[pixel_offset<kDense>(p, p.x_stride, p.pixels * i / 8)]);
  }
  return sum / 8;
}

// A factor is in x's dtype or in float.
template <class S>
__device__ __forceinline__ Compute<S> read(const GroupNormFactor& f, int64_t b, int64_t c, Compute<S> absent) {
  if (!f.p) return absent;
  const int64_t i = b * f.batch_stride + c * f.c_stride;
  if (f.dtype == Dtype::f32) return static_cast<const float*>(f.p)[i];
  return to_compute(static_cast<const S*>(f.p)[i]);
}

// (xhat * weight + bias) * (1 + scale) + shift = xhat * gain + offset
template <class T>
struct Affine {
  T gain, offset;
};
template <class S>
__device__ __forceinline__ Affine<Compute<S>> affine(const GroupNormParams& p, int64_t b, int64_t c) {
  const Compute<S> scale = 1 + read<S>(p.scale, b, c, 0);
  return {read<S>(p.weight, b, c, 1) * scale, read<S>(p.bias, b, c, 0) * scale + read<S>(p.shift, b, c, 0)};
}

// Of a group: its mean is center + lost, of which center alone is kept.
template <class T>
struct Statistics {
  T center, lost, rstd;
};
template <class T>
__device__ __forceinline__ Statistics<T> finish(const Moments<T>& m, T pivot, double eps) {
  const T center = pivot + m.mean;
  return {center, (pivot - center) + m.mean, T(1) / sqrt((m.n > 0 ? m.m2 / m.n : T(0)) + T(eps))};
}
// Those of a group from all its parts, for every thread of the team whose lane this is; or as the caller knows them.
template <class S, bool kDense = false>
__device__ __forceinline__ Statistics<Compute<S>> statistics_of(const GroupNormParams& p,
                                                                const Moments<Compute<S>>* parts, int64_t count,
                                                                int64_t b, int64_t g, int lane, int team) {
  using T = Compute<S>;
  const int64_t unit = b * p.groups + g;
  if (p.moments) {
    const T* const known = static_cast<const T*>(p.moments) + 2 * unit;
    return finish(Moments<T>{1, known[0], known[1]}, T(0), p.eps);
  }
  return finish(merge_parts(parts + unit * count, count, lane, team), pivot_of<S, kDense>(p, b, g), p.eps);
}
template <class T>
__device__ __forceinline__ void keep(const GroupNormParams& p, int64_t unit, const Statistics<T>& s) {
  static_cast<T*>(p.mean)[unit] = s.center;
  static_cast<T*>(p.rstd)[unit] = s.rstd;
}
template <class T>
__device__ __forceinline__ Statistics<T> kept(const GroupNormParams& p, int64_t unit) {
  return {static_cast<const T*>(p.mean)[unit], 0, static_cast<const T*>(p.rstd)[unit]};
}

// Of a channel: z = (x - center) * gain + offset is the argument of the activation. The subtraction comes first: folded
// into the offset it would cancel where |mean| is far above the deviation.
template <class T>
struct Coefficients {
  T center, gain, offset;
};
template <class S>
__device__ __forceinline__ Coefficients<Compute<S>> coefficients(const GroupNormParams& p,
                                                                 const Statistics<Compute<S>>& s, int64_t b,
                                                                 int64_t c) {
  const Affine<Compute<S>> f = affine<S>(p, b, c);
  const Compute<S> gain = f.gain * s.rstd;
  return {s.center, gain, f.offset - s.lost * gain};
}

// SiLU for half precision: an exact division takes as long as everything else together, and two ulp of a float vanish
// when the result is rounded.
template <class S>
__device__ __forceinline__ float fast_sigmoid(float z) {
  return __fdividef(1.f, 1.f + __expf(-z));
}
template <Activation A, class S>
__device__ __forceinline__ Compute<S> act(Compute<S> z) {
  if constexpr (A == Activation::silu && sizeof(S) == 2) return z * fast_sigmoid<S>(z);
  return activate<A, Compute<S>>(z);
}
template <Activation A, class S>
__device__ __forceinline__ Compute<S> act_derivative(Compute<S> z) {
  if constexpr (A == Activation::silu && sizeof(S) == 2) {
    const float s = fast_sigmoid<S>(z);
    return s * (1.f + z * (1.f - s));
  }
  return activate_derivative<A, Compute<S>>(z);
}

// What a kernel is compiled for. SiLU and no activation, those of image generators, have kernels of their own; the
// others are looked up for every load, and odd places are walked element by element: both with one load under way, so
// that neither takes long to compile.
enum class Known { silu, linear, no };

template <class S_, int kWidth, Known kKnown>
struct Way {
  using S = S_;
  using T = Compute<S>;
  static constexpr int W = kWidth;
  static constexpr bool kDense = W > 1;
  static constexpr bool kUnrolled = kDense && kKnown != Known::no;
  static constexpr int kBlocks = sizeof(S) == 8 ? 2 : 0;  // to a multiprocessor; else what the compiler makes of it

  // f with the activation as a constant.
  template <class F>
  static __device__ __forceinline__ void with_activation(Activation activation, const F& f) {
    if constexpr (kKnown == Known::silu) {
      f.template operator()<Activation::silu>();
    } else if constexpr (kKnown == Known::linear) {
      f.template operator()<Activation::linear>();
    } else {
      switch (activation) {
        case Activation::relu: return f.template operator()<Activation::relu>();
        case Activation::lrelu: return f.template operator()<Activation::lrelu>();
        case Activation::silu: return f.template operator()<Activation::silu>();
        case Activation::gelu: return f.template operator()<Activation::gelu>();
        case Activation::tanh: return f.template operator()<Activation::tanh>();
        case Activation::sigmoid: return f.template operator()<Activation::sigmoid>();
        default: return f.template operator()<Activation::linear>();
      }
    }
  }
};

// Calls f.template operator()<Way>() for the dtype and the width of the cut; where the kernel activates, also for what
// is known of the activation.
template <bool kActivates, class F>
cudaError_t dispatch(const GroupNormParams& p, const GroupNormCut& cut, const F& f) {
  return dispatch_dtype(p.dtype, [&]<class S>() {
    constexpr int W = kPackSize<S>;
    if constexpr (sizeof(S) < 8) {
      if (cut.width == W) {
        if (!kActivates || p.activation == Activation::linear) return f.template operator()<Way<S, W, Known::linear>>();
        if constexpr (kActivates) {
          if (p.activation == Activation::silu) return f.template operator()<Way<S, W, Known::silu>>();
          return f.template operator()<Way<S, W, Known::no>>();
        }
      }
    }
    return f.template operator()<Way<S, 1, Known::no>>();
  });
}

}  // namespace
}  // namespace imagegen::cuda
