// group_norm on CUDA: the choice of the kernels, and those that work on groups rather than on pixels.
//
// Forward: one launch where a group fits in a block's shared memory, which reads x once (8 us for 16 MiB, read and
// written, at 4.3 TB/s less what the L2 holds); else two, statistics and apply; a third in between where the parts of a
// group are so many that merging them in every block would show; apply alone where the moments are known. Backward:
// sums, one number for each channel of them, gradient. The factors: statistics, then a number for each channel.
#include "ops/cuda/group_norm.cuh"

namespace imagegen::cuda {
namespace {

// Merged in front of every block of the apply kernel; more of them take a launch of their own.
constexpr int64_t kPartsInFront = 256;

// Shared memory of the kernel that keeps a group. From kFewUnits blocks on they fill a GPU, and a group may take all
// that the smallest GPU's multiprocessor has (99 KiB); fewer of them only as long as reading takes no longer than the
// launch it saves: 32 KiB by one multiprocessor, 0.5 us.
constexpr int kKeptBytes = 96 << 10, kKeptBytesOfFew = 32 << 10, kFewUnits = 64;

// All parts of a group.
template <class T>
__global__ void __launch_bounds__(kThreads)
    group_norm_merge_kernel(const Moments<T>* parts, int64_t count, Moments<T>* merged) {
  const Moments<T> m = merge_parts(parts + int64_t{blockIdx.x} * count, count, threadIdx.x, kThreads);
  if (threadIdx.x == 0) merged[blockIdx.x] = m;
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_factors_kernel(GroupNormParams p, const Moments<Compute<S>>* parts, int64_t count) {
  using T = Compute<S>;
  const int64_t unit = blockIdx.x, b = unit / p.groups, g = unit - b * p.groups, group_channels = p.channels / p.groups;
  const Statistics<T> s = statistics_of<S>(p, parts, count, b, g, threadIdx.x, kThreads);
  if (threadIdx.x == 0) keep(p, unit, s);
  for (int64_t c = g * group_channels + threadIdx.x; c < (g + 1) * group_channels; c += kThreads) {
    const Coefficients<T> k = coefficients<S>(p, s, b, c);
    static_cast<T*>(p.gain)[b * p.channels + c] = k.gain;
    static_cast<T*>(p.offset)[b * p.channels + c] = k.offset - k.center * k.gain;
  }
}

// The sums of every channel of a group, and what its gradient subtracts: (x - mean) * slope + level.
template <class S>
__global__ void __launch_bounds__(kThreads) group_norm_sums_kernel(GroupNormParams p, const Sums<Compute<S>>* parts,
                                                                   int64_t slices, int team, Compute<S>* level_slope) {
  using T = Compute<S>;
  const int64_t unit = blockIdx.x, b = unit / p.groups, g = unit - b * p.groups, group_channels = p.channels / p.groups;
  const Statistics<T> s = kept<T>(p, unit);
  Sums<T> of_group{};
  for (int64_t first = 0; first < group_channels; first += kThreads / team) {
    const int64_t i = first + threadIdx.x / team, c = g * group_channels + i;
    Sums<T> sums{};
    if (i < group_channels)
      for (int64_t j = threadIdx.x % team; j < slices; j += team)
        sums = merge(sums, parts[(b * p.channels + c) * slices + j]);
    sums = merge_team(sums, team);
    if (i < group_channels && threadIdx.x % team == 0) {
      static_cast<T*>(p.sum_dz)[b * p.channels + c] = sums.dz;
      static_cast<T*>(p.sum_dz_xhat)[b * p.channels + c] = sums.dz_d * s.rstd;
      const T gain = affine<S>(p, b, c).gain;
      of_group = merge(of_group, Sums<T>{gain * sums.dz, gain * sums.dz_d});
    }
  }
  of_group = merge_team(of_group, kThreads);
  if (threadIdx.x == 0) {
    const T n = T(group_channels) * T(p.pixels), share = n > 0 ? s.rstd / n : T(0);
    level_slope[2 * unit] = of_group.dz * share;
    level_slope[2 * unit + 1] = of_group.dz_d * s.rstd * s.rstd * share;
  }
}

// A whole group in shared memory, with the gain and offset of each of its channels behind it.
template <class Way>
__global__ void __launch_bounds__(kThreads) group_norm_kept_kernel(GroupNormParams p, int elements) {
  using S = typename Way::S;
  using T = typename Way::T;
  constexpr int W = Way::W;
  const int64_t unit = blockIdx.x, b = unit / p.groups, g = unit - b * p.groups;
  const int group_channels = static_cast<int>(p.channels / p.groups), pixels = static_cast<int>(p.pixels);
  const T pivot = pivot_of<S, true>(p, b, g);
  const S* x = x_at<S>(p, b, g * group_channels);
  S* y = static_cast<S*>(p.y) + unit * elements;
  S* group = dynamic_shared<S>();
  T* gain = reinterpret_cast<T*>(group + elements);
  T* offset = gain + group_channels;

  Sums<T> sum{};
#pragma unroll 4
  for (int i = threadIdx.x * W; i < elements; i += kThreads * W) {
    const Values<S, W> v = load_values<W>(x + i);
    store_values<W>(group + i, v);
#pragma unroll
    for (int w = 0; w < W; ++w) sum.dz += to_compute(v.at[w]) - pivot;
  }
  const T mean = merge_team(sum, kThreads).dz / elements;
  Sums<T> square{};
  for (int i = threadIdx.x * W; i < elements; i += kThreads * W) {
    const Values<S, W> v = load_values<W>(group + i);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const T d = to_compute(v.at[w]) - pivot - mean;
      square.dz += d * d;
    }
  }
  const Statistics<T> s = finish(Moments<T>{T(elements), mean, merge_team(square, kThreads).dz}, pivot, p.eps);
  if (threadIdx.x == 0) keep(p, unit, s);
  for (int c = threadIdx.x; c < group_channels; c += kThreads) {
    const Coefficients<T> k = coefficients<S>(p, s, b, g * group_channels + c);
    gain[c] = k.gain, offset[c] = k.offset;
  }
  __syncthreads();
  for (int i = threadIdx.x * W; i < elements; i += kThreads * W) {
    Values<S, W> v = load_values<W>(group + i);
    const int c = i / pixels;
    const T by = gain[c], plus = offset[c];
    Way::with_activation(p.activation, [&]<Activation A>() {
#pragma unroll
      for (int w = 0; w < W; ++w) v.at[w] = from_compute<S>(act<A, S>((to_compute(v.at[w]) - s.center) * by + plus));
    });
    store_values<W>(y + i, v);
  }
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// Whether every load of 16 bytes lies at a multiple of 16 in t, and pixels at equal distances.
bool packs(const GroupNormParams& p, const void* t, int64_t batch_stride, int64_t c_stride, const int64_t* stride) {
  const int64_t width = 16 / size_of(p.dtype), run = p.channels_innermost ? p.channels : p.pixels;
  bool whole = reinterpret_cast<uintptr_t>(t) % 16 == 0 && run % width == 0 && batch_stride % width == 0;
  if (p.channels_innermost) {
    return whole && p.dims == 1 && (p.size[0] == 1 || stride[0] % width == 0) && (c_stride == 1 || p.channels == 1);
  }
  return whole && c_stride % width == 0 && p.dims == 1 && stride[0] == 1;
}

GroupNormCut cut_of(const GroupNormParams& p) {
  const bool wide = p.dtype != Dtype::f64 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0 &&
                    packs(p, p.x, p.x_batch_stride, p.x_c_stride, p.x_stride) &&
                    (!p.backward || packs(p, p.grad, p.grad_batch_stride, p.grad_c_stride, p.grad_stride));
  const int width = wide ? static_cast<int>(16 / size_of(p.dtype)) : 1;
  return p.channels_innermost ? innermost::cut(p, width) : planar::cut(p, width);
}

int64_t parts_per_group(const GroupNormParams& p, const GroupNormCut& cut) {
  return cut.slices * (p.channels_innermost ? 1 : p.channels / p.groups);
}

bool is_empty(const GroupNormParams& p) {
  return p.batch * p.channels == 0;
}

// Whether a block can keep a group: it is one run of memory in whole loads, not too large.
bool fits(const GroupNormParams& p, const GroupNormCut& cut) {
  const int64_t group_channels = p.channels / p.groups, elements = group_channels * p.pixels;
  const int64_t bytes = elements * size_of(p.dtype) + 2 * group_channels * int64_t{sizeof(float)};
  return !p.channels_innermost && cut.width > 1 && (p.x_c_stride == p.pixels || group_channels == 1) && p.pixels > 0 &&
         bytes <= (p.batch * p.groups < kFewUnits ? kKeptBytesOfFew : kKeptBytes);
}

cudaError_t keep_groups(const GroupNormParams& p, const GroupNormCut& cut, cudaStream_t stream) {
  const int64_t group_channels = p.channels / p.groups, elements = group_channels * p.pixels;
  return dispatch<true>(p, cut, [&]<class Way>() {
    if constexpr (Way::kDense) {
      const size_t shared = elements * sizeof(typename Way::S) + 2 * group_channels * sizeof(typename Way::T);
      return launch(group_norm_kept_kernel<Way>, dim3(static_cast<unsigned>(p.batch * p.groups)), kThreads, shared,
                    stream, p, static_cast<int>(elements));
    }
    return cudaSuccess;  // never: `fits` asks for whole loads
  });
}

cudaError_t forward(const GroupNormParams& p, const GroupNormCut& cut, void* workspace, cudaStream_t stream) {
  if (p.moments)
    return (p.channels_innermost ? innermost::apply : planar::apply)(p, cut, {nullptr, 0, nullptr, stream});
  const int64_t units = p.batch * p.groups;
  GroupNormWork work{workspace, parts_per_group(p, cut), nullptr, stream};
  cudaError_t error = (p.channels_innermost ? innermost::statistics : planar::statistics)(p, cut, work);
  if (error != cudaSuccess) return error;
  return dispatch_dtype(p.dtype, [&]<class S>() {
    using T = Compute<S>;
    Moments<T>* parts = static_cast<Moments<T>*>(work.parts);
    const dim3 grid(static_cast<unsigned>(units));
    if (p.gain) return launch(group_norm_factors_kernel<S>, grid, kThreads, 0, stream, p, parts, work.parts_per_group);
    if (work.parts_per_group > kPartsInFront) {
      Moments<T>* merged = parts + units * work.parts_per_group;
      error = launch(group_norm_merge_kernel<T>, grid, kThreads, 0, stream, parts, work.parts_per_group, merged);
      work.parts = merged, work.parts_per_group = 1;
      if (error != cudaSuccess) return error;
    }
    return (p.channels_innermost ? innermost::apply : planar::apply)(p, cut, work);
  });
}

cudaError_t backward(const GroupNormParams& p, const GroupNormCut& cut, void* workspace, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&]<class S>() {
    using T = Compute<S>;
    Sums<T>* parts = static_cast<Sums<T>*>(workspace);
    T* level_slope = reinterpret_cast<T*>(parts + p.batch * p.channels * cut.slices);
    const GroupNormWork work{parts, 0, level_slope, stream};
    cudaError_t error = (p.channels_innermost ? innermost::gradient_sums : planar::gradient_sums)(p, cut, work);
    if (error != cudaSuccess) return error;
    int team = 1;  // threads that merge the slices of a channel
    while (team < 32 && team < cut.slices) team *= 2;
    error = launch(group_norm_sums_kernel<S>, dim3(static_cast<unsigned>(p.batch * p.groups)), kThreads, 0, stream, p,
                   parts, cut.slices, team, level_slope);
    if (error != cudaSuccess) return error;
    return (p.channels_innermost ? innermost::gradient : planar::gradient)(p, cut, work);
  });
}

}  // namespace

int64_t group_norm_workspace_bytes(const GroupNormParams& p) {
  if (is_empty(p)) return 0;
  const GroupNormCut cut = cut_of(p);
  const int64_t units = p.batch * p.groups, number = p.dtype == Dtype::f64 ? 8 : 4;
  if (p.backward) return number * 2 * (p.batch * p.channels * cut.slices + units);
  return p.moments || (p.y && fits(p, cut)) ? 0 : number * 3 * units * (parts_per_group(p, cut) + 1);
}

cudaError_t group_norm_kernel(const GroupNormParams& p, void* workspace, cudaStream_t stream) {
  if (is_empty(p)) return cudaSuccess;
  const GroupNormCut cut = cut_of(p);
  if (p.backward) return backward(p, cut, workspace, stream);
  return p.y && !p.moments && fits(p, cut) ? keep_groups(p, cut, stream) : forward(p, cut, workspace, stream);
}

}  // namespace imagegen::cuda
