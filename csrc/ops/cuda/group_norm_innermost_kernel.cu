// group_norm where a pixel's channels lie together: a block takes a span of channels, whole groups of 128 bytes or
// more, of some pixels. Its threads stand in rows, a row to a pixel; each keeps what belongs to its few channels.
//
// Bytes and predictions are those of the planar kernels: rows of 128 bytes fill the same sectors.
#include "ops/cuda/group_norm.cuh"

namespace imagegen::cuda {
namespace {

constexpr int64_t kBlocks = 2048, kSpanBytes = 128;

struct Tile {
  int lane, row, rows;     // of this thread; rows beyond the last have nothing to do
  int64_t b, c, g, piece;  // the first channel and group
  int channels, groups, group_channels;
  int64_t begin, n;  // pixels

  __device__ __forceinline__ Tile(const GroupNormParams& p, const GroupNormCut& cut, bool backwards) {
    const int64_t block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x, image_span = block / cut.slices;
    piece = block - image_span * cut.slices;
    b = image_span / cut.spans, c = (image_span - b * cut.spans) * cut.span;
    channels = static_cast<int>(p.channels - c < cut.span ? p.channels - c : cut.span);
    group_channels = static_cast<int>(p.channels / p.groups);
    g = c / group_channels, groups = channels / group_channels;
    begin = piece * cut.slice;
    n = p.pixels - begin < cut.slice ? p.pixels - begin : cut.slice;
    lane = threadIdx.x % cut.team, row = threadIdx.x / cut.team, rows = kThreads / cut.team;
  }
};

// Calls f(first channel of this thread, whether it has some, channels) for as many channels of the span at a time as
// the threads of a row take.
template <int W, class F>
__device__ __forceinline__ void for_columns(const Tile& t, const GroupNormCut& cut, const F& f) {
  const int width = cut.team * W;
  for (int base = 0; base < t.channels; base += width) {
    const int column = base + t.lane * W, rest = t.channels - base;
    f(base, column, t.row < t.rows && column < t.channels, rest < width ? rest : width);
  }
}

// Calls f(first pixel, loads) for the loads of this thread, U at a time and t.rows pixels apart.
template <int U, class F>
__device__ __forceinline__ void for_loads(const Tile& t, const F& f) {
  for (int64_t i = t.row; i < t.n; i += U * t.rows) {
    const int64_t loads = (t.n - i + t.rows - 1) / t.rows;
    f(t.begin + i, loads < U ? static_cast<int>(loads) : U);
  }
}

template <int W, int U, class S>
__device__ __forceinline__ void load_unrolled(Values<S, W>* v, const S* column, const GroupNormParams& p,
                                              const int64_t* stride, int64_t pixel, int rows, int loads) {
#pragma unroll
  for (int j = 0; j < U; ++j) {
    v[j] = {};
    if (j < loads) v[j] = load_values<W>(column + pixel_offset<(W > 1)>(p, stride, pixel + j * rows));
  }
}

template <class S, int W>
__device__ __forceinline__ void load_coefficients(Coefficients<Compute<S>>* k, const GroupNormParams& p, const Tile& t,
                                                  const Statistics<Compute<S>>* statistics, int column) {
#pragma unroll
  for (int w = 0; w < W; ++w)
    k[w] = coefficients<S>(p, statistics[(column + w) / t.group_channels], t.b, t.c + column + w);
}

template <class T>
__device__ __forceinline__ void load_kept(Statistics<T>* statistics, const GroupNormParams& p, const Tile& t) {
  for (int i = threadIdx.x; i < t.groups; i += kThreads) statistics[i] = kept<T>(p, t.b * p.groups + t.g + i);
  __syncthreads();
}

// Shared memory: the moments of every thread's channels, and of each group its moments so far and its pivot.
template <class Way>
__global__ void __launch_bounds__(kThreads, 2)
    innermost_statistics_kernel(GroupNormParams p, GroupNormCut cut, Moments<typename Way::T>* parts) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = Way::kUnrolled ? kUnroll : 1;
  const Tile t(p, cut, false);
  Moments<T>* of_thread = dynamic_shared<Moments<T>>();  // [rows, channels of a row]
  Moments<T>* of_group = of_thread + kThreads * W;
  T* pivot = reinterpret_cast<T*>(of_group + t.groups);
  for (int i = threadIdx.x; i < t.groups; i += kThreads) {
    pivot[i] = pivot_of<S, Way::kDense>(p, t.b, t.g + i);
    of_group[i] = {};
  }
  __syncthreads();

  for_columns<W>(t, cut, [&](int base, int column, bool active, int channels) {
    if (active) {
      const S* x = x_at<S>(p, t.b, t.c + column);
      T about[W], n = 0, mean[W]{}, m2[W]{};
#pragma unroll
      for (int w = 0; w < W; ++w) about[w] = pivot[(column + w) / t.group_channels];
      for_loads<U>(t, [&](int64_t pixel, int loads) {
        Values<S, W> v[U];
        load_unrolled<W, U>(v, x, p, p.x_stride, pixel, t.rows, loads);
        const T more = T(loads), total = n + more, share = more / total;
#pragma unroll
        for (int w = 0; w < W; ++w) {
          T d[U], sum = 0, squares = 0;
#pragma unroll
          for (int j = 0; j < U; ++j) {
            d[j] = to_compute(v[j].at[w]) - about[w];
            if (j < loads) sum += d[j];
          }
          const T mean_now = sum / more, apart = mean_now - mean[w];
#pragma unroll
          for (int j = 0; j < U; ++j)
            if (j < loads) squares += (d[j] - mean_now) * (d[j] - mean_now);
          m2[w] += squares + apart * apart * n * share;
          mean[w] += apart * share;
        }
        n = total;
      });
#pragma unroll
      for (int w = 0; w < W; ++w) of_thread[threadIdx.x * W + w] = {n, mean[w], m2[w]};
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < t.groups; i += kWarps) {
      int first = i * t.group_channels - base, last = first + t.group_channels;
      first = first < 0 ? 0 : first, last = last > channels ? channels : last;
      if (first >= last) continue;
      Moments<T> m{};
      const int wide = last - first;
      for (int e = threadIdx.x % 32; e < t.rows * wide; e += 32)
        m = merge(m, of_thread[e / wide * cut.team * W + first + e % wide]);
      m = merge_team(m, 32);
      if (threadIdx.x % 32 == 0) of_group[i] = merge(of_group[i], m);
    }
    __syncthreads();
  });
  for (int i = threadIdx.x; i < t.groups; i += kThreads)
    parts[(t.b * p.groups + t.g + i) * cut.slices + t.piece] = of_group[i];
}

// Shared memory: the statistics of each group.
template <class Way>
__global__ void __launch_bounds__(kThreads, 2)
    innermost_apply_kernel(GroupNormParams p, GroupNormCut cut, const Moments<typename Way::T>* parts, int64_t count) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = Way::kUnrolled ? 2 : 1;
  const Tile t(p, cut, true);
  Statistics<T>* statistics = dynamic_shared<Statistics<T>>();
  for (int i = threadIdx.x / 32; i < t.groups; i += kWarps) {
    const int64_t unit = t.b * p.groups + t.g + i;
    const Statistics<T> s = statistics_of<S, Way::kDense>(p, parts, count, t.b, t.g + i, threadIdx.x % 32, 32);
    if (threadIdx.x % 32 != 0) continue;
    statistics[i] = s;
    if (t.piece == 0) keep(p, unit, statistics[i]);
  }
  __syncthreads();

  for_columns<W>(t, cut, [&](int, int column, bool active, int) {
    if (!active) return;
    Coefficients<T> k[W];
    load_coefficients<S, W>(k, p, t, statistics, column);
    const S* x = x_at<S>(p, t.b, t.c + column);
    S* y = static_cast<S*>(p.y) + t.b * p.pixels * p.channels + t.c + column;
    for_loads<U>(t, [&](int64_t pixel, int loads) {
      Values<S, W> v[U];
      load_unrolled<W, U>(v, x, p, p.x_stride, pixel, t.rows, loads);
      Way::with_activation(p.activation, [&]<Activation A>() {
#pragma unroll
        for (int j = 0; j < U; ++j) {
#pragma unroll
          for (int w = 0; w < W; ++w)
            v[j].at[w] = from_compute<S>(act<A, S>((to_compute(v[j].at[w]) - k[w].center) * k[w].gain + k[w].offset));
          if (j < loads) store_values<W>(y + (pixel + j * t.rows) * p.channels, v[j]);
        }
      });
    });
  });
}

// Shared memory: the sums of every thread's channels, and the statistics of each group.
template <class Way>
__global__ void __launch_bounds__(kThreads, 2)
    innermost_gradient_sums_kernel(GroupNormParams p, GroupNormCut cut, Sums<typename Way::T>* parts) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = Way::kUnrolled ? 2 : 1;
  const Tile t(p, cut, false);
  Sums<T>* of_thread = dynamic_shared<Sums<T>>();  // [rows, channels of a row]
  Statistics<T>* statistics = reinterpret_cast<Statistics<T>*>(of_thread + kThreads * W);
  load_kept(statistics, p, t);

  for_columns<W>(t, cut, [&](int base, int column, bool active, int channels) {
    if (active) {
      Coefficients<T> k[W];
      load_coefficients<S, W>(k, p, t, statistics, column);
      const S *x = x_at<S>(p, t.b, t.c + column), *grad = grad_at<S>(p, t.b, t.c + column);
      Sums<T> sums[W]{};
      for_loads<U>(t, [&](int64_t pixel, int loads) {
        Values<S, W> v[U], dy[U];
        load_unrolled<W, U>(v, x, p, p.x_stride, pixel, t.rows, loads);
        load_unrolled<W, U>(dy, grad, p, p.grad_stride, pixel, t.rows, loads);
        Way::with_activation(p.activation, [&]<Activation A>() {
#pragma unroll
          for (int j = 0; j < U; ++j)
#pragma unroll
            for (int w = 0; w < W; ++w) {
              const T d = to_compute(v[j].at[w]) - k[w].center;
              const T dz = to_compute(dy[j].at[w]) * act_derivative<A, S>(d * k[w].gain + k[w].offset);
              if (j < loads) sums[w] = merge(sums[w], Sums<T>{dz, dz * d});
            }
        });
      });
#pragma unroll
      for (int w = 0; w < W; ++w) of_thread[threadIdx.x * W + w] = sums[w];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < channels; i += kThreads) {
      Sums<T> sums{};
      for (int r = 0; r < t.rows; ++r) sums = merge(sums, of_thread[r * cut.team * W + i]);
      parts[(t.b * p.channels + t.c + base + i) * cut.slices + t.piece] = sums;
    }
    __syncthreads();
  });
}

// Shared memory: the statistics of each group.
template <class Way>
__global__ void __launch_bounds__(kThreads, 2)
    innermost_gradient_kernel(GroupNormParams p, GroupNormCut cut, const typename Way::T* level_slope) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = 1;
  const Tile t(p, cut, true);
  Statistics<T>* statistics = dynamic_shared<Statistics<T>>();
  load_kept(statistics, p, t);
  level_slope += 2 * (t.b * p.groups + t.g);

  for_columns<W>(t, cut, [&](int, int column, bool active, int) {
    if (!active) return;
    Coefficients<T> k[W];
    T level[W], slope[W];
    load_coefficients<S, W>(k, p, t, statistics, column);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const int i = (column + w) / t.group_channels;
      level[w] = level_slope[2 * i], slope[w] = level_slope[2 * i + 1];
    }
    const S *x = x_at<S>(p, t.b, t.c + column), *grad = grad_at<S>(p, t.b, t.c + column);
    S* dx = static_cast<S*>(p.y) + t.b * p.pixels * p.channels + t.c + column;
    for_loads<U>(t, [&](int64_t pixel, int loads) {
      Values<S, W> v[U], dy[U];
      load_unrolled<W, U>(v, x, p, p.x_stride, pixel, t.rows, loads);
      load_unrolled<W, U>(dy, grad, p, p.grad_stride, pixel, t.rows, loads);
      Way::with_activation(p.activation, [&]<Activation A>() {
#pragma unroll
        for (int j = 0; j < U; ++j) {
#pragma unroll
          for (int w = 0; w < W; ++w) {
            const T d = to_compute(v[j].at[w]) - k[w].center;
            const T dz = to_compute(dy[j].at[w]) * act_derivative<A, S>(d * k[w].gain + k[w].offset);
            v[j].at[w] = from_compute<S>(dz * k[w].gain - (d * slope[w] + level[w]));
          }
          if (j < loads) store_values<W>(dx + (pixel + j * t.rows) * p.channels, v[j]);
        }
      });
    });
  });
}

dim3 grid(const GroupNormParams& p, const GroupNormCut& cut) {
  return static_cast<unsigned>(p.batch * cut.spans * cut.slices);
}

int64_t groups_of(const GroupNormParams& p, const GroupNormCut& cut) {
  return cut.span / (p.channels / p.groups);
}

}  // namespace

namespace innermost {

GroupNormCut cut(const GroupNormParams& p, int width) {
  const int64_t group = p.channels / p.groups, bytes = p.dtype == Dtype::f64 ? 8 : p.dtype == Dtype::f32 ? 4 : 2;
  GroupNormCut cut{width, 1, 1, p.pixels, group, 0};
  while (cut.span < p.channels && (cut.span * bytes < kSpanBytes || cut.span % width)) cut.span += group;
  cut.spans = ceil_div(p.channels, cut.span);
  const int64_t lanes = ceil_div(cut.span, width);
  cut.team = lanes < kThreads ? static_cast<int>(lanes) : kThreads;
  const int64_t least = kThreads / cut.team * kUnroll;  // pixels with which each thread has its loads
  cut.slices = ceil_div(kBlocks, p.batch * cut.spans);
  if (cut.slices * least > p.pixels) cut.slices = ceil_div(p.pixels, least);
  if (cut.slices < 1) cut.slices = 1;
  cut.slice = ceil_div(p.pixels, cut.slices);
  if (cut.slice > 0) cut.slices = ceil_div(p.pixels, cut.slice);
  return cut;
}

cudaError_t statistics(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return dispatch<false>(p, cut, [&]<class Way>() {
    using T = typename Way::T;
    const size_t shared = kThreads * Way::W * sizeof(Moments<T>) + groups_of(p, cut) * (sizeof(Moments<T>) + sizeof(T));
    return launch(innermost_statistics_kernel<Way>, grid(p, cut), kThreads, shared, work.stream, p, cut,
                  static_cast<Moments<T>*>(work.parts));
  });
}

cudaError_t apply(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return dispatch<true>(p, cut, [&]<class Way>() {
    using T = typename Way::T;
    return launch(innermost_apply_kernel<Way>, grid(p, cut), kThreads, groups_of(p, cut) * sizeof(Statistics<T>),
                  work.stream, p, cut, static_cast<const Moments<T>*>(work.parts), work.parts_per_group);
  });
}

cudaError_t gradient_sums(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return dispatch<true>(p, cut, [&]<class Way>() {
    using T = typename Way::T;
    const size_t shared = kThreads * Way::W * sizeof(Sums<T>) + groups_of(p, cut) * sizeof(Statistics<T>);
    return launch(innermost_gradient_sums_kernel<Way>, grid(p, cut), kThreads, shared, work.stream, p, cut,
                  static_cast<Sums<T>*>(work.parts));
  });
}

cudaError_t gradient(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return dispatch<true>(p, cut, [&]<class Way>() {
    using T = typename Way::T;
    return launch(innermost_gradient_kernel<Way>, grid(p, cut), kThreads, groups_of(p, cut) * sizeof(Statistics<T>),
                  work.stream, p, cut, static_cast<const T*>(work.level_slope));
  });
}

}  // namespace innermost
}  // namespace imagegen::cuda
