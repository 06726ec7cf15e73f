#include "common/launch.cuh"
#include "common/scalar.cuh"
// after scalar.cuh, whose INLINE it takes
#include "common/philox.h"
#include "ops/sampler_step.h"

namespace imagegen::cuda {
namespace {

constexpr int kThreads = 256, kQuad = 4;             // a thread takes four elements: one counter's normals
constexpr int kPassThreads = 512, kDigits = 1 << 8;  // of the pass before: a block for each sample

// Blocks a multiprocessor must hold at once: left to itself the compiler spills to hold more.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

static_assert(sizeof(SamplerStepParams) + sizeof(StepRows) + 64 <= 4096, "a kernel's parameters are 4 KB at most");

// One sample's row in shared memory; nan where the counter has left the table.
template <class T>
struct Row {
  T column[kStepColumns + kStepMaxSlots];
  uint32_t step;
};

template <class T>
__device__ void read_row(const SamplerStepParams& p, const StepRows& rows, int64_t sample, Row<T>& row) {
  const int columns = kStepColumns + p.slots;
  if (static_cast<int>(threadIdx.x) < columns) {
    int64_t at = rows.by_sample ? sample : 0;
    uint32_t step = p.step;
    if (rows.index) {
      at = rows.index[rows.by_sample ? sample * rows.index_stride : 0];
      step = static_cast<uint32_t>(at);
    }
    const int64_t offset = at * rows.row_stride + threadIdx.x * rows.column_stride;
    T value = static_cast<T>(nan(""));
    if (!rows.data)
      value = static_cast<T>(rows.value[threadIdx.x]);
    else if (0 <= at && at < rows.count)
      value = rows.is_double ? static_cast<T>(static_cast<const double*>(rows.data)[offset])
                             : static_cast<T>(static_cast<const float*>(rows.data)[offset]);
    row.column[threadIdx.x] = value;
    row.step = step;
  }
  __syncthreads();
}

INLINE int64_t offset_of(const StepOperand& o, int64_t i) {
  if (o.dims == 1) return i * o.stride[0];
  int64_t offset = 0;
  for (int d = o.dims - 1; d >= 0; --d) {
    offset += i % o.size[d] * o.stride[d];
    i /= o.size[d];
  }
  return offset;
}

template <class S>
struct alignas(sizeof(S) == 8 ? 16 : 4 * sizeof(S)) Four {
  S at[kQuad];
};

// Calls f.template operator()<S>() for an operand's element type.
template <class F>
INLINE void with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f.template operator()<float>();
    case Dtype::bf16: return f.template operator()<bf16>();
    case Dtype::f16: return f.template operator()<fp16>();
    default: return f.template operator()<double>();
  }
}

// n of four elements; zeros where the tensor is not wanted, which is then not read. Strides are walked one element at a
// time by code that is there once: unrolled for every dtype it took minutes to compile.
template <class T>
INLINE void load(const StepOperand& o, bool packed, int64_t sample, int64_t first, int n, bool wanted, T* v) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j) v[j] = T(0);
  if (!wanted) return;
  if (packed && n == kQuad) {
    with_element(o.dtype, [&]<class S>() {
      const S* p = static_cast<const S*>(o.data) + sample * o.sample_stride + first;
      const Four<S> four = *reinterpret_cast<const Four<S>*>(p);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) v[j] = static_cast<T>(to_compute(four.at[j]));
    });
    return;
  }
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const int64_t offset = sample * o.sample_stride + offset_of(o, first + i);
    T element = T(0);
    with_element(o.dtype,
                 [&]<class S>() { element = static_cast<T>(to_compute(static_cast<const S*>(o.data)[offset])); });
#pragma unroll
    for (int j = 0; j < kQuad; ++j) v[j] = i == j ? element : v[j];  // registers have no index
  }
}

template <class T>
INLINE void store(const StepOperand& o, bool packed, int64_t sample, int64_t first, int n, const T* v) {
  if (packed && n == kQuad) {
    with_element(o.dtype, [&]<class S>() {
      Four<S> four;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) four.at[j] = from_compute<S>(static_cast<Compute<S>>(v[j]));
      *reinterpret_cast<Four<S>*>(static_cast<S*>(o.data) + sample * o.sample_stride + first) = four;
    });
    return;
  }
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const int64_t offset = sample * o.sample_stride + offset_of(o, first + i);
    T element = v[0];
#pragma unroll
    for (int j = 1; j < kQuad; ++j) element = i == j ? v[j] : element;
    with_element(o.dtype, [&]<class S>() {
      static_cast<S*>(o.data)[offset] = from_compute<S>(static_cast<Compute<S>>(element));
    });
  }
}

// to += c times an operand, or, where it is not given, times generated noise; nan where neither is there, since the
// host may not have seen the row to refuse it.
template <class T>
INLINE void add(const SamplerStepParams& p, uint32_t packed, int operand, T c, int64_t sample, int64_t first, int n,
                T* to) {
  if (c == T(0)) return;
  T v[kQuad];
  if (p.operand[operand].data) {
    load(p.operand[operand], packed >> operand & 1, sample, first, n, true, v);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) v[j] = static_cast<T>(nan(""));
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) to[j] += c * v[j];
}

template <class T>
INLINE void add_noise(const SamplerStepParams& p, uint32_t packed, int operand, uint32_t stream, uint32_t step, T c,
                      int64_t sample, int64_t first, int n, T* to) {
  if (c == T(0)) return;
  if (p.operand[operand].data || !p.seeded) return add(p, packed, operand, c, sample, first, n, to);
  const NoiseKey key{p.seed, p.first + static_cast<uint32_t>(sample), step, stream};
  const auto [x, y, z, w] =
      noise_words<uint32_t>(key, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(first / 4 >> 32));
  float normal[kQuad];
  box_muller<uint32_t>(x, y, normal[0], normal[1]);
  box_muller<uint32_t>(z, w, normal[2], normal[3]);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) to[j] += c * static_cast<T>(normal[j]);
}

template <class T>
INLINE T clip(T v, T bound) {  // nan stays nan
  return v > bound ? bound : v < -bound ? -bound : v;
}

// The guided output of four elements; `factor` is that of its rescaling.
template <class T>
INLINE void guide(const SamplerStepParams& p, uint32_t packed, int64_t sample, int64_t first, int n, bool wanted,
                  T factor, T* m) {
  load(p.operand[kModelOutput], packed >> kModelOutput & 1, sample, first, n, wanted, m);
  if (!p.operand[kUncondOutput].data) return;
  const T g = static_cast<T>(p.guidance ? p.guidance[sample] : p.scale);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) m[j] = g == T(0) ? T(0) : g * m[j];
  if (wanted) add(p, packed, kUncondOutput, T(1) - g, sample, first, n, m);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) m[j] *= factor;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    step_kernel(SamplerStepParams p, StepRows rows, int64_t blocks) {
  Row<T>& row = *dynamic_shared<Row<T>>();
  const int64_t sample = blockIdx.x / blocks;
  const int64_t first = (blockIdx.x % blocks * kThreads + threadIdx.x) * kQuad;
  read_row(p, rows, sample, row);
  if (first >= p.size) return;
  const int n = p.size - first < kQuad ? static_cast<int>(p.size - first) : kQuad;
  const T *c = row.column, *slot = c + kStepColumnsBefore, *after = slot + p.slots;

  const bool wants_x0 = c[kC0] != T(0) || after[kQ0] != T(0);
  T x[kQuad], m[kQuad], x0[kQuad], y[kQuad];
  load(p.operand[kX], rows.packed >> kX & 1, sample, first, n,
       (wants_x0 && c[kAx] != T(0)) || c[kCx] != T(0) || after[kQx] != T(0), x);
  guide(p, rows.packed, sample, first, n, (wants_x0 && c[kAm] != T(0)) || c[kCm] != T(0) || after[kQm] != T(0),
        p.factor ? static_cast<T>(p.factor[sample]) : T(1), m);
  const T bound = static_cast<T>(p.bound ? p.bound[sample] : p.clip), divisor = p.bound ? bound : T(1);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    x0[j] = wants_x0 ? clip(c[kAx] * x[j] + c[kAm] * m[j], bound) / divisor : T(0);
    y[j] = c[kCx] * x[j] + c[kC0] * x0[j] + c[kCm] * m[j];
  }
  add_noise(p, rows.packed, kNoise, 0, row.step, c[kCn], sample, first, n, y);
  for (int k = 0; k < p.slots; ++k) add(p, rows.packed, kSlots + k, slot[k], sample, first, n, y);

  if (p.operand[kMask].data) {
    T mask[kQuad], other[kQuad] = {};
    load(p.operand[kMask], rows.packed >> kMask & 1, sample, first, n, true, mask);
    add(p, rows.packed, kKnown, after[kB0], sample, first, n, other);
    add_noise(p, rows.packed, kKnownNoise, 1, row.step, after[kB1], sample, first, n, other);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) y[j] = mask[j] * y[j] + (T(1) - mask[j]) * other[j];
  }

  // Every store comes after the thread's last load: x' may lie where x does, and what is stored in a slot that was
  // read.
  int to = -1;
  if (!p.in_place)
    to = p.operand[kStored].data ? static_cast<int>(kStored) : -1;
  else
    for (int k = 0; k < p.slots; ++k) to = after[kSlot] == T(k) ? kSlots + k : to;
  if (to >= 0) {
    T h[kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) h[j] = after[kQx] * x[j] + after[kQ0] * x0[j] + after[kQm] * m[j];
    store(p.operand[to], rows.packed >> to & 1, sample, first, n, h);
  }
  store(p.operand[kNext], rows.packed >> kNext & 1, sample, first, n, y);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) y[j] *= c[kScale];
  for (int copy = 0; copy < p.copies; ++copy)
    store(p.operand[kModelInput], rows.packed >> kModelInput & 1, sample + copy * p.samples, first, n, y);
}

// What the pass before keeps in shared memory.
template <class T>
struct Pass {
  Row<T> row;
  double part[kPassThreads];
  unsigned long long count[kDigits], not_above, nans, found;
};

// The sum over the block, added up in the order of threads; every thread gets it.
template <class T>
__device__ double block_sum(Pass<T>& pass, double v) {
  __syncthreads();
  pass.part[threadIdx.x] = v;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kPassThreads; ++i) total += pass.part[i];
  return total;
}

INLINE unsigned long long bits_of(float v) {
  return float_to_words(v);
}
INLINE unsigned long long bits_of(double v) {
  unsigned long long bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}
INLINE void of_bits(unsigned long long bits, float& v) {
  v = words_to_float(static_cast<uint32_t>(bits));
}
INLINE void of_bits(unsigned long long bits, double& v) {
  memcpy(&v, &bits, sizeof(v));
}

// Calls body(j of x_0's magnitude, element) for the thread's share of a sample.
template <class T, class F>
__device__ void each_magnitude(const SamplerStepParams& p, uint32_t packed, const Row<T>& row, int64_t sample, T factor,
                               const F& body) {
  const T a_x = row.column[kAx], a_m = row.column[kAm];
  for (int64_t first = int64_t{threadIdx.x} * kQuad; first < p.size; first += kPassThreads * kQuad) {
    const int n = p.size - first < kQuad ? static_cast<int>(p.size - first) : kQuad;
    T x[kQuad], m[kQuad];
    load(p.operand[kX], packed >> kX & 1, sample, first, n, a_x != T(0), x);
    guide(p, packed, sample, first, n, a_m != T(0), factor, m);
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      if (j < n) body(abs(a_x * x[j] + a_m * m[j]));
  }
}

// Before the step, for each sample: the factor that gives the guided output the conditional one's deviation as far as
// `rescale` says, and the quantile of |x_0|, whose digits are found from the highest by counting.
template <class T>
__global__ void __launch_bounds__(kPassThreads, 1) pass_kernel(SamplerStepParams p, StepRows rows) {
  Pass<T>& pass = *dynamic_shared<Pass<T>>();
  const int64_t sample = blockIdx.x;
  const bool leads = threadIdx.x == 0;
  read_row(p, rows, sample, pass.row);

  T factor = T(1);
  if (p.factor) {
    double mean[2] = {}, squares[2] = {};
#pragma unroll
    for (int round = 0; round < 2; ++round) {
      double sum[2] = {};
      for (int64_t first = int64_t{threadIdx.x} * kQuad; first < p.size; first += kPassThreads * kQuad) {
        const int n = p.size - first < kQuad ? static_cast<int>(p.size - first) : kQuad;
        T cond[kQuad], guided[kQuad];
        load(p.operand[kModelOutput], rows.packed >> kModelOutput & 1, sample, first, n, true, cond);
        guide(p, rows.packed, sample, first, n, true, T(1), guided);
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if (j >= n) break;
          const double a = static_cast<double>(cond[j]) - mean[0], b = static_cast<double>(guided[j]) - mean[1];
          sum[0] += round ? a * a : a;
          sum[1] += round ? b * b : b;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const double total = block_sum(pass, sum[i]);
        (round ? squares : mean)[i] = round ? total : total / static_cast<double>(p.size);
      }
    }
    const double rest = static_cast<double>(p.size - 1);
    factor = static_cast<T>(p.rescale * sqrt(squares[0] / rest) / sqrt(squares[1] / rest) + 1 - p.rescale);
    if (leads) p.factor[sample] = factor;
  }
  if (!p.bound) return;

  const double rank = p.threshold * static_cast<double>(p.size - 1);
  const int64_t below = static_cast<int64_t>(rank);
  if (leads) pass.not_above = pass.nans = pass.found = 0;
  unsigned long long known = 0;
  for (int shift = sizeof(T) * 8 - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += kPassThreads) pass.count[i] = 0;
    __syncthreads();
    const unsigned long long found = pass.found;
    each_magnitude(p, rows.packed, pass.row, sample, factor, [&](T v) {
      const unsigned long long bits = bits_of(v);
      if ((bits & known) == found) atomicAdd(&pass.count[bits >> shift & (kDigits - 1)], 1ull);
      if (known == 0 && v != v) atomicAdd(&pass.nans, 1ull);
    });
    __syncthreads();
    if (leads) {
      int digit = 0;
      while (pass.not_above + pass.count[digit] <= static_cast<unsigned long long>(below))
        pass.not_above += pass.count[digit++];
      pass.found |= static_cast<unsigned long long>(digit) << shift;
      if (shift == 0) pass.not_above += pass.count[digit];
    }
    known |= static_cast<unsigned long long>(kDigits - 1) << shift;
    __syncthreads();
  }
  T low;
  of_bits(pass.found, low);
  T high = low;
  if (pass.nans == 0 && static_cast<double>(below) < rank &&
      pass.not_above == static_cast<unsigned long long>(below) + 1) {  // the next one up is another number
    double next = HUGE_VAL;
    each_magnitude(p, rows.packed, pass.row, sample, factor, [&](T v) {
      if (v > low && static_cast<double>(v) < next) next = static_cast<double>(v);
    });
    pass.part[threadIdx.x] = next;
    __syncthreads();
    for (int i = 0; i < kPassThreads; ++i) next = pass.part[i] < next ? pass.part[i] : next;
    high = static_cast<T>(next);
  }
  if (leads) {
    double s = low;
    if (low != high) s += (rank - static_cast<double>(below)) * (static_cast<double>(high) - static_cast<double>(low));
    p.bound[sample] = pass.nans ? nan("") : s < 1 ? 1 : s > p.clip ? p.clip : s;
  }
}

template <class T>
cudaError_t run(const SamplerStepParams& p, const StepRows& rows, cudaStream_t stream) {
  if (p.factor || p.bound) {
    const cudaError_t error =
        launch(pass_kernel<T>, dim3(static_cast<unsigned>(p.samples)), kPassThreads, sizeof(Pass<T>), stream, p, rows);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = (p.size + kThreads * kQuad - 1) / (kThreads * kQuad);
  return launch(step_kernel<T>, dim3(static_cast<unsigned>(p.samples * blocks)), kThreads, sizeof(Row<T>), stream, p,
                rows, blocks);
}

}  // namespace

cudaError_t sampler_step_kernel(const SamplerStepParams& p, const StepRows& rows, cudaStream_t stream) {
  return p.dtype == Dtype::f64 ? run<double>(p, rows, stream) : run<float>(p, rows, stream);
}

}  // namespace imagegen::cuda
