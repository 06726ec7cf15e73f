// group_norm where each channel's pixels lie together: the threads of a row share a slice of one plane, so that every
// coefficient is one number.
//
// Bytes are all that counts; with x read twice and y written once of E elements, at H200's 4.3 TB/s of DRAM:
//   (1,128,5120x256) bf16   statistics 78 us, apply 156 us, together 234 us (asked: 260)
//   (1,128,1024x1024) fp32  statistics 125 us, apply 250 us
// A backward reads x and its gradient twice and writes dx once: 390 us of the first. Where a tensor stays in the L2 of
// 50 MB the second reading comes from there; above, the rows are walked backwards, so that its end does.
#include "ops/cuda/group_norm.cuh"

namespace imagegen::cuda {
namespace {

constexpr int64_t kBlocks =
    4096;  // more than twice what the largest GPU holds at a time, so that the last ones even out

struct Row {
  int lane;                // of the team
  int64_t index, b, c, g;  // index: [B, C, slices]
  int64_t begin, n;        // pixels; n is 0 beyond the last row

  __device__ __forceinline__ Row(const GroupNormParams& p, const GroupNormCut& cut, bool backwards) {
    const int64_t block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x, rows = p.batch * p.channels * cut.slices;
    lane = threadIdx.x % cut.team;
    index = block * (kThreads / cut.team) + threadIdx.x / cut.team;
    const bool beyond = index >= rows;
    if (beyond) index = rows - 1;
    const int64_t plane = index / cut.slices;
    begin = (index - plane * cut.slices) * cut.slice;
    n = beyond ? 0 : p.pixels - begin < cut.slice ? p.pixels - begin : cut.slice;
    b = plane / p.channels, c = plane - b * p.channels, g = c / (p.channels / p.groups);
    if (beyond) index = -1;
  }
  __device__ __forceinline__ bool leads() const { return lane == 0 && index >= 0; }
};

// Calls f(first pixel, loads) for the loads of this thread, U at a time and `step` pixels apart; those from
// `loads` on are beyond the row.
template <int W, int U, class F>
__device__ __forceinline__ void for_loads(const Row& row, int step, const F& f) {
  for (int64_t i = row.lane * W; i < row.n; i += U * step) {
    const int64_t loads = (row.n - i + step - 1) / step;
    f(row.begin + i, loads < U ? static_cast<int>(loads) : U);
  }
}

template <int W, int U, class S>
__device__ __forceinline__ void load_unrolled(Values<S, W>* v, const S* plane, const GroupNormParams& p,
                                              const int64_t* stride, int64_t pixel, int step, int loads) {
#pragma unroll
  for (int j = 0; j < U; ++j) {
    v[j] = {};
    const int64_t at = pixel + j * step;
    if (j < loads) v[j] = load_values<W>(plane + (W > 1 ? at : pixel_offset<false>(p, stride, at)));
  }
}

template <class Way>
__global__ void __launch_bounds__(kThreads, Way::kBlocks)
    planar_statistics_kernel(GroupNormParams p, GroupNormCut cut, Moments<typename Way::T>* parts) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = Way::kUnrolled ? kUnroll : 1;
  const Row row(p, cut, false);
  const S* x = x_at<S>(p, row.b, row.c);
  const T pivot = pivot_of<S, Way::kDense>(p, row.b, row.g);
  const int step = cut.team * W;
  Moments<T> m{};
  for_loads<W, U>(row, step, [&](int64_t pixel, int loads) {
    Values<S, W> v[U];
    load_unrolled<W, U>(v, x, p, p.x_stride, pixel, step, loads);
    T d[U][W], total = 0, m2 = 0;
#pragma unroll
    for (int j = 0; j < U; ++j)
#pragma unroll
      for (int w = 0; w < W; ++w) {
        d[j][w] = to_compute(v[j].at[w]) - pivot;
        if (j < loads) total += d[j][w];
      }
    const T n = T(loads * W), mean = total / n;
#pragma unroll
    for (int j = 0; j < U; ++j)
#pragma unroll
      for (int w = 0; w < W; ++w)
        if (j < loads) m2 += (d[j][w] - mean) * (d[j][w] - mean);
    m = merge(m, Moments<T>{n, mean, m2});
  });
  m = merge_team(m, cut.team);
  if (row.leads()) parts[row.index] = m;
}

template <class Way>
__global__ void __launch_bounds__(kThreads, Way::kBlocks)
    planar_apply_kernel(GroupNormParams p, GroupNormCut cut, const Moments<typename Way::T>* parts, int64_t count) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = Way::kUnrolled ? kUnroll : 1;
  const Row row(p, cut, true);
  const int64_t unit = row.b * p.groups + row.g;
  const Statistics<T> s = statistics_of<S, Way::kDense>(p, parts, count, row.b, row.g, row.lane, cut.team);
  if (row.leads() && row.begin == 0 && row.c % (p.channels / p.groups) == 0) keep(p, unit, s);
  const Coefficients<T> k = coefficients<S>(p, s, row.b, row.c);

  const S* x = x_at<S>(p, row.b, row.c);
  S* y = static_cast<S*>(p.y) + (row.b * p.channels + row.c) * p.pixels;
  const int step = cut.team * W;
  for_loads<W, U>(row, step, [&](int64_t pixel, int loads) {
    Values<S, W> v[U];
    load_unrolled<W, U>(v, x, p, p.x_stride, pixel, step, loads);
    Way::with_activation(p.activation, [&]<Activation A>() {
#pragma unroll
      for (int j = 0; j < U; ++j) {
#pragma unroll
        for (int w = 0; w < W; ++w)
          v[j].at[w] = from_compute<S>(act<A, S>((to_compute(v[j].at[w]) - k.center) * k.gain + k.offset));
        if (j < loads) store_values<W>(y + pixel + j * step, v[j]);
      }
    });
  });
}

template <class Way>
__global__ void __launch_bounds__(kThreads, Way::kBlocks)
    planar_gradient_sums_kernel(GroupNormParams p, GroupNormCut cut, Sums<typename Way::T>* parts) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = Way::kUnrolled ? kUnroll : 1;
  const Row row(p, cut, false);
  const Coefficients<T> k = coefficients<S>(p, kept<T>(p, row.b * p.groups + row.g), row.b, row.c);
  const S *x = x_at<S>(p, row.b, row.c), *grad = grad_at<S>(p, row.b, row.c);
  const int step = cut.team * W;
  Sums<T> sums{};
  for_loads<W, U>(row, step, [&](int64_t pixel, int loads) {
    Values<S, W> v[U], dy[U];
    load_unrolled<W, U>(v, x, p, p.x_stride, pixel, step, loads);
    load_unrolled<W, U>(dy, grad, p, p.grad_stride, pixel, step, loads);
    Way::with_activation(p.activation, [&]<Activation A>() {
#pragma unroll
      for (int j = 0; j < U; ++j)
#pragma unroll
        for (int w = 0; w < W; ++w) {
          const T d = to_compute(v[j].at[w]) - k.center;
          const T dz = to_compute(dy[j].at[w]) * act_derivative<A, S>(d * k.gain + k.offset);
          if (j < loads) sums = merge(sums, Sums<T>{dz, dz * d});
        }
    });
  });
  sums = merge_team(sums, cut.team);
  if (row.leads()) parts[row.index] = sums;
}

template <class Way>
__global__ void __launch_bounds__(kThreads, Way::kBlocks)
    planar_gradient_kernel(GroupNormParams p, GroupNormCut cut, const typename Way::T* level_slope) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W, U = Way::kUnrolled ? kUnroll : 1;
  const Row row(p, cut, true);
  const int64_t unit = row.b * p.groups + row.g;
  const Coefficients<T> k = coefficients<S>(p, kept<T>(p, unit), row.b, row.c);
  const T level = level_slope[2 * unit], slope = level_slope[2 * unit + 1];
  const S *x = x_at<S>(p, row.b, row.c), *grad = grad_at<S>(p, row.b, row.c);
  S* dx = static_cast<S*>(p.y) + (row.b * p.channels + row.c) * p.pixels;
  const int step = cut.team * W;
  for_loads<W, U>(row, step, [&](int64_t pixel, int loads) {
    Values<S, W> v[U], dy[U];
    load_unrolled<W, U>(v, x, p, p.x_stride, pixel, step, loads);
    load_unrolled<W, U>(dy, grad, p, p.grad_stride, pixel, step, loads);
    Way::with_activation(p.activation, [&]<Activation A>() {
#pragma unroll
      for (int j = 0; j < U; ++j) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
          const T d = to_compute(v[j].at[w]) - k.center;
          const T dz = to_compute(dy[j].at[w]) * act_derivative<A, S>(d * k.gain + k.offset);
          v[j].at[w] = from_compute<S>(dz * k.gain - (d * slope + level));
        }
        if (j < loads) store_values<W>(dx + pixel + j * step, v[j]);
      }
    });
  });
}

dim3 grid(const GroupNormParams& p, const GroupNormCut& cut) {
  return static_cast<unsigned>(ceil_div(p.batch * p.channels * cut.slices, kThreads / cut.team));
}

// Launches kernel_of<Way>(), which takes p, the cut and what is left, of types that the Way decides.
template <bool kActivates, class KernelOf, class... Rest>
cudaError_t run(const KernelOf& kernel_of, const GroupNormParams& p, const GroupNormCut& cut, cudaStream_t stream,
                Rest... rest) {
  return dispatch<kActivates>(p, cut, [&]<class Way>() {
    return launch(kernel_of.template operator()<Way>(), grid(p, cut), kThreads, 0, stream, p, cut, rest...);
  });
}

}  // namespace

namespace planar {

// A thread has one load of a small plane and U at a time of a large one, which many blocks share.
GroupNormCut cut(const GroupNormParams& p, int width) {
  GroupNormCut cut{width, 4, 1, p.pixels, 0, 0};
  while (cut.team < kThreads && cut.team * width < p.pixels) cut.team *= 2;
  if (cut.team < kThreads) return cut;
  const int64_t least = int64_t{kUnroll} * kThreads * width, share = p.batch * p.channels * p.pixels / kBlocks;
  cut.slice = round_up(share > least ? share : least, least);
  cut.slices = ceil_div(p.pixels, cut.slice);
  return cut;
}

cudaError_t statistics(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return run<false>([]<class Way>() { return planar_statistics_kernel<Way>; }, p, cut, work.stream, work.parts);
}

cudaError_t apply(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return run<true>([]<class Way>() { return planar_apply_kernel<Way>; }, p, cut, work.stream, work.parts,
                   work.parts_per_group);
}

cudaError_t gradient_sums(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return run<true>([]<class Way>() { return planar_gradient_sums_kernel<Way>; }, p, cut, work.stream, work.parts);
}

cudaError_t gradient(const GroupNormParams& p, const GroupNormCut& cut, const GroupNormWork& work) {
  return run<true>([]<class Way>() { return planar_gradient_kernel<Way>; }, p, cut, work.stream, work.level_slope);
}

}  // namespace planar
}  // namespace imagegen::cuda
