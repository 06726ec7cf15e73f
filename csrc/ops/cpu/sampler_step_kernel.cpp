#include "common/parallel.h"
#include "common/philox_simd.h"
#include "ops/sampler_step.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

enum Stream : uint32_t { kStreamOfNoise, kStreamOfKnownNoise };

// A sample's row, worked out to one coefficient for each tensor. x_0 is a sum of its own only where it is bounded: else
// its terms go into the others'.
template <class T>
struct Plan {
  int terms,
      before;  // only the first `before` of them, x and the model's outputs, have a part in x_0 and what is stored
  int source[kStepTerms];
  T x0[kStepTerms], next[kStepTerms], stored[kStepTerms];
  bool bounded;
  T bound, next_x0, stored_x0;
  const StepOperand* store;  // null: nothing is stored
  T scale, known, known_noise;
  NoiseKey key;
};

template <class T>
Plan<T> make_plan(const SamplerStepParams& p, int64_t sample) {
  const double *row = p.rows + sample * p.row_stride, *slot = row + kStepColumnsBefore, *after = slot + p.slots;
  const double g = p.guidance ? p.guidance[sample] : p.scale, factor = p.factor ? p.factor[sample] : 1;
  const double cond = g * factor, uncond = (1 - g) * factor;
  const double s = p.bound ? p.bound[sample] : 1;  // of the threshold: x_0 is bounded by it and divided by it

  Plan<T> plan{};
  plan.bounded = (p.bound || p.clip < __builtin_inf()) && (row[kC0] != 0 || after[kQ0] != 0);
  plan.bound = T(p.bound ? s : p.clip), plan.next_x0 = T(row[kC0] / s), plan.stored_x0 = T(after[kQ0] / s);
  const double folded = plan.bounded ? 0 : 1;
  const auto add = [&](int source, double x0, double next, double stored) {
    next += folded * row[kC0] * x0, stored += folded * after[kQ0] * x0;
    x0 = plan.bounded ? x0 : 0;
    if (x0 == 0 && next == 0 && stored == 0) return;
    const int t = plan.terms++;
    plan.source[t] = source, plan.x0[t] = T(x0), plan.next[t] = T(next), plan.stored[t] = T(stored);
  };
  add(kX, row[kAx], row[kCx], after[kQx]);
  add(kModelOutput, row[kAm] * cond, row[kCm] * cond, after[kQm] * cond);
  add(kUncondOutput, row[kAm] * uncond, row[kCm] * uncond, after[kQm] * uncond);
  plan.before = plan.terms;
  const auto add_to_next = [&](int source, double next) {
    if (next == 0) return;
    plan.source[plan.terms] = source, plan.next[plan.terms++] = T(next);
  };
  add_to_next(kNoise, row[kCn]);
  for (int k = 0; k < p.slots; ++k) add_to_next(kSlots + k, slot[k]);

  if (!p.in_place)
    plan.store = p.operand[kStored].data ? &p.operand[kStored] : nullptr;
  else if (after[kSlot] >= 0)
    plan.store = &p.operand[kSlots + static_cast<int>(after[kSlot])];
  plan.scale = T(row[kScale]), plan.known = T(after[kB0]), plan.known_noise = T(after[kB1]);
  const uint32_t step = p.index ? static_cast<uint32_t>(p.index[sample * p.index_stride]) : p.step;
  plan.key = {p.seed, p.first + static_cast<uint32_t>(sample), step, kStreamOfNoise};
  return plan;
}

// Calls run(offset in memory, elements done, how many) for every stretch of equal steps in elements first … first +
// n-1.
template <class F>
INLINE void for_each_run(const StepOperand& o, int64_t first, int64_t n, const F& run) {
  int64_t at[kStepMaxDims], offset = 0;
  for (int d = o.dims - 1; d >= 0; --d) {
    at[d] = first % o.size[d], first /= o.size[d];
    offset += at[d] * o.stride[d];
  }
  const int inner = o.dims - 1;
  for (int64_t done = 0; done < n;) {
    const int64_t length = min(n - done, o.size[inner] - at[inner]);
    run(offset, done, length);
    done += length, at[inner] += length, offset += length * o.stride[inner];
    for (int d = inner; d > 0 && at[d] == o.size[d]; --d) {
      offset += o.stride[d - 1] - at[d] * o.stride[d];
      at[d] = 0, ++at[d - 1];
    }
  }
}

template <class T, class S>
INLINE void read_run(const S* from, int64_t stride, T* to, int64_t n) {
  if constexpr (std::is_same_v<T, Compute<S>>) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; i += kLanes<T>) store(to + i, load(from + i, n - i), n - i);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(to_compute(from[i * stride]));
}

template <class T, class S>
INLINE void write_run(S* to, int64_t stride, const T* from, T scale, int64_t n, bool streamed) {
  if constexpr (std::is_same_v<T, Compute<S>>) {
    if (stride == 1) {
      int64_t i = 0;
      if constexpr (std::is_same_v<T, S>)
        if (streamed && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0)
          for (; i + kLanes<T> <= n; i += kLanes<T>) stream(to + i, load(from + i) * scale);
      for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, load(from + i) * scale);
      if (i < n) store(to + i, load(from + i, n - i) * scale, n - i);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) to[i * stride] = from_compute<S>(static_cast<Compute<S>>(from[i] * scale));
}

// A block of an operand, where it lies or in `block`.
template <class T>
const T* fetch(const StepOperand& o, int64_t sample, int64_t first, int64_t n, T* block) {
  const T* found = block;
  dispatch_dtype(o.dtype, [&]<class S>() {
    const S* data = static_cast<const S*>(o.data) + sample * o.sample_stride;
    if constexpr (std::is_same_v<S, T>)
      if (o.dims == 1 && o.stride[0] == 1) return void(found = data + first);
    for_each_run(o, first, n, [&](int64_t offset, int64_t done, int64_t length) {
      read_run(data + offset, o.stride[o.dims - 1], block + done, length);
    });
  });
  return found;
}

template <class T>
void put(const StepOperand& o, int64_t sample, int64_t first, int64_t n, const T* block, T scale, bool streamed) {
  dispatch_dtype(o.dtype, [&]<class S>() {
    S* data = static_cast<S*>(o.data) + sample * o.sample_stride;
    for_each_run(o, first, n, [&](int64_t offset, int64_t done, int64_t length) {
      write_run(data + offset, o.stride[o.dims - 1], block + done, scale, length, streamed);
    });
  });
}

template <class T>
void make_noise(NoiseKey key, Stream stream, int64_t first, int64_t n, T* block) {
  key.stream = stream;
  if constexpr (std::is_same_v<T, float>) {
    noise(key, first, n, block);
  } else {
    float part[kStepBlock];
    noise(key, first, n, part);
    for (int64_t i = 0; i < n; ++i) block[i] = part[i];
  }
}

template <class T>
INLINE Vec<T> bounded(Vec<T> v, T bound) {  // nan stays nan
  v = select<T>(v > bound, broadcast(bound), v);
  return select<T>(v < -bound, broadcast(-bound), v);
}

// The blocks of memory a thread works in.
template <class T>
struct Blocks {
  alignas(64) T term[kStepTerms][kStepBlock];
  alignas(64) T next[kStepBlock], stored[kStepBlock];
};

// Where V vectors of x' and what is stored go: memory of their own, or where an operand lies.
template <class T>
struct Outputs {
  T *next, *stored;
  T* copy[2];  // s' x'; null: none
  bool streamed;
};

// V vectors from element i of every term: x' and what is stored. Terms that come from memory are asked for a block
// ahead: the processor's own prefetching stops at the end of every page, as often as a block (a seventh faster in
// place).
template <bool kBounded, bool kStores, bool kStreams, int V, bool kTail, class T>
INLINE void combine(const Plan<T>& k, const T* const* term, int64_t i, int64_t rest, const Outputs<T>& to) {
  constexpr int L = kLanes<T>;
  Vec<T> x0[V] = {}, next[V] = {}, stored[V] = {};
  const auto at = [&](int t, int v) {
    const T* p = term[t] + i + v * L;
    if (kStreams) __builtin_prefetch(p + kStepBlock);
    return kTail ? load(p, rest) : load(p);
  };
  const auto put = [&](T* p, int v, Vec<T> value) {
    if (kTail)
      store(p + i, value, rest);
    else if (kStreams)
      stream(p + i + v * L, value);
    else
      store(p + i + v * L, value);
  };
  for (int t = 0; t < k.before; ++t) {
    const T a = k.x0[t], c = k.next[t], q = k.stored[t];
    UNROLL(8)
    for (int v = 0; v < V; ++v) {
      const Vec<T> x = at(t, v);
      if constexpr (kBounded) x0[v] += a * x;
      next[v] += c * x;
      if constexpr (kStores) stored[v] += q * x;
    }
  }
  for (int t = k.before; t < k.terms; ++t) {
    const T c = k.next[t];
    UNROLL(8)
    for (int v = 0; v < V; ++v) next[v] += c * at(t, v);
  }
  UNROLL(8)
  for (int v = 0; v < V; ++v) {
    if constexpr (kBounded) {
      x0[v] = bounded<T>(x0[v], k.bound);
      next[v] += k.next_x0 * x0[v];
      if constexpr (kStores) stored[v] += k.stored_x0 * x0[v];
    }
    put(to.next, v, next[v]);
    if constexpr (kStores) put(to.stored, v, stored[v]);
    for (T* copy : to.copy)
      if (copy) put(copy, v, k.scale * next[v]);
  }
}

template <bool kBounded, bool kStores, bool kStreams, class T>
void combine_block(const Plan<T>& k, const T* const* term, int64_t n, const Outputs<T>& to) {
  constexpr int V = kVectorBytes == 64 ? 4 : 2, L = kLanes<T>;
  int64_t i = 0;
  for (; i + V * L <= n; i += V * L) combine<kBounded, kStores, kStreams, V, false>(k, term, i, n - i, to);
  for (; i + L <= n; i += L) combine<kBounded, kStores, kStreams, 1, false>(k, term, i, n - i, to);
  if (i < n) combine<kBounded, kStores, kStreams, 1, true>(k, term, i, n - i, to);
}

template <class T>
void combine_block(const Plan<T>& k, const T* const* term, int64_t n, const Outputs<T>& to) {
  const auto bounded = [&]<bool kBounded>() {
    if (k.store)
      to.streamed ? combine_block<kBounded, true, true>(k, term, n, to)
                  : combine_block<kBounded, true, false>(k, term, n, to);
    else
      to.streamed ? combine_block<kBounded, false, true>(k, term, n, to)
                  : combine_block<kBounded, false, false>(k, term, n, to);
  };
  k.bounded ? bounded.template operator()<true>() : bounded.template operator()<false>();
}

// mask x' + (1 - mask) (b_0 known + b_1 noise')
template <class T>
void blend(const SamplerStepParams& p, const Plan<T>& k, int64_t sample, int64_t first, int64_t n, Blocks<T>& b) {
  const T* mask = fetch(p.operand[kMask], sample, first, n, b.term[0]);
  const T *known = nullptr, *noise = b.term[2];
  if (k.known != 0) known = fetch(p.operand[kKnown], sample, first, n, b.term[1]);
  if (k.known_noise != 0) {
    if (p.operand[kKnownNoise].data)
      noise = fetch(p.operand[kKnownNoise], sample, first, n, b.term[2]);
    else
      make_noise(k.key, kStreamOfKnownNoise, first, n, b.term[2]);
  }
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> m = load(mask + i, n - i);
    Vec<T> other{};
    if (k.known != 0) other += k.known * load(known + i, n - i);
    if (k.known_noise != 0) other += k.known_noise * load(noise + i, n - i);
    store(b.next + i, m * load(b.next + i) + (T(1) - m) * other);
  }
}

template <class T>
void fetch_terms(const SamplerStepParams& p, const Plan<T>& k, int count, int64_t sample, int64_t first, int64_t n,
                 Blocks<T>& b, const T** term) {
  for (int t = 0; t < count; ++t) {
    const StepOperand& o = p.operand[k.source[t]];
    if (o.data)
      term[t] = fetch(o, sample, first, n, b.term[t]);
    else
      make_noise(k.key, kStreamOfNoise, first, n, b.term[t]), term[t] = b.term[t];
  }
}

// Where elements first … lie side by side as T, fit to be streamed to if asked; else null.
template <class T>
T* direct(const StepOperand& o, int64_t sample, int64_t first, bool streamed) {
  constexpr Dtype kOwn = std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32;
  if (o.dtype != kOwn || o.dims != 1 || o.stride[0] != 1) return nullptr;
  T* p = static_cast<T*>(o.data) + sample * o.sample_stride + first;
  return streamed && reinterpret_cast<uintptr_t>(p) % kVectorBytes ? nullptr : p;
}

// Where every output can be written as it is made; next is null where one can't.
template <class T>
Outputs<T> direct_outputs(const SamplerStepParams& p, const Plan<T>& k, int64_t sample, int64_t first) {
  Outputs<T> to{direct<T>(p.operand[kNext], sample, first, p.streamed), nullptr, {}, p.streamed};
  if (p.operand[kMask].data) to.next = nullptr;
  if (k.store && !(to.stored = direct<T>(*k.store, sample, first, p.streamed))) to.next = nullptr;
  for (int c = 0; c < p.copies; ++c)
    if (!(to.copy[c] = direct<T>(p.operand[kModelInput], sample + c * p.samples, first, p.streamed))) to.next = nullptr;
  return to;
}

template <class T>
void step_block(const SamplerStepParams& p, const Plan<T>& k, int64_t sample, int64_t first, int64_t n, Blocks<T>& b) {
  const T* term[kStepTerms];
  fetch_terms(p, k, k.terms, sample, first, n, b, term);
  const Outputs<T> to = direct_outputs(p, k, sample, first);
  if (to.next) return combine_block(k, term, n, to);

  combine_block(k, term, n, Outputs<T>{b.next, b.stored, {}, false});
  if (p.operand[kMask].data) blend(p, k, sample, first, n, b);
  put(p.operand[kNext], sample, first, n, b.next, T(1), p.streamed);
  if (k.store) put(*k.store, sample, first, n, b.stored, T(1), p.streamed);
  for (int c = 0; c < p.copies; ++c)
    put(p.operand[kModelInput], sample + c * p.samples, first, n, b.next, k.scale, p.streamed);
}

// Calls body(sample, block, first element, how many, plan, blocks) for every block of every sample.
template <class T, class F>
void for_each_block(const SamplerStepParams& p, const F& body) {
  const int64_t blocks = step_blocks(p.size);
  parallel_for(p.samples * blocks, 32, [&](int64_t begin, int64_t end) {
    Blocks<T> memory;
    Plan<T> plan;
    int64_t planned = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / blocks, first = item % blocks * kStepBlock;
      if (sample != planned) plan = make_plan<T>(p, sample), planned = sample;
      body(sample, item, first, min(kStepBlock, p.size - first), plan, memory);
    }
    if (p.streamed) finish_streams();
  });
}

// Mean and sum of squared deviations of a block.
template <class T>
void moments(const T* v, int64_t n, double* to) {
  Vec<T> total{}, squares{};
  for (int64_t i = 0; i < n; i += kLanes<T>) total += load(v + i, n - i);
  const T mean = sum<T>(total) / T(n);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) squares += (load(v + i) - mean) * (load(v + i) - mean);
  double rest = 0;
  for (; i < n; ++i) rest += static_cast<double>(v[i] - mean) * static_cast<double>(v[i] - mean);
  to[0] = mean, to[1] = static_cast<double>(sum<T>(squares)) + rest;
}

// The standard deviation from the moments of all blocks, joined in order (Chan, Golub & LeVeque 1983).
inline double deviation(const double* moments, int64_t size) {
  double mean = 0, squares = 0;
  int64_t count = 0;
  for (int64_t first = 0; first < size; first += kStepBlock, moments += 4) {
    const int64_t n = min(kStepBlock, size - first), all = count + n;
    const double delta = moments[0] - mean;
    squares +=
        moments[1] + delta * delta * static_cast<double>(count) * static_cast<double>(n) / static_cast<double>(all);
    mean += delta * static_cast<double>(n) / static_cast<double>(all);
    count = all;
  }
  return __builtin_sqrt(squares / static_cast<double>(size - 1));
}

// The factor that gives the guided output the deviation of the conditional one, as far as `rescale` says.
template <class T>
void find_factors(const SamplerStepParams& p) {
  const int64_t blocks = step_blocks(p.size);
  for (int64_t sample = 0; sample < p.samples; ++sample) p.factor[sample] = 1;
  for_each_block<T>(p, [&](int64_t sample, int64_t item, int64_t first, int64_t n, const Plan<T>&, Blocks<T>& b) {
    const double g = p.guidance ? p.guidance[sample] : p.scale;
    const T* cond = fetch(p.operand[kModelOutput], sample, first, n, b.term[0]);
    const T* uncond = g == 1 ? nullptr : fetch(p.operand[kUncondOutput], sample, first, n, b.term[1]);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      Vec<T> m = T(g) * load(cond + i, n - i);
      if (uncond) m += T(1 - g) * load(uncond + i, n - i);
      store(b.next + i, m);
    }
    moments(cond, n, p.partials + item * 4);
    moments(b.next, n, p.partials + item * 4 + 2);
  });
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    const double* partials = p.partials + sample * blocks * 4;
    p.factor[sample] = p.rescale * deviation(partials, p.size) / deviation(partials + 2, p.size) + 1 - p.rescale;
  }
}

// The numbers |x_0| of a sample as their bits, which sort as the numbers do.
template <class T>
struct Magnitudes {
  using B = std::make_unsigned_t<std::remove_reference_t<decltype(Bits<T>{}[0])>>;
  static constexpr int kDigit = 11, kBits = sizeof(B) * 8;
  const T* value;
  int64_t size;

  template <class F>
  void each(const F& body) const {
    for (int64_t i = 0; i < size; ++i) body(bit_cast<B>(value[i]));
  }
};

// The number of this rank, found digit by digit from the highest, and how many are not above it.
template <class T>
T of_rank(const Magnitudes<T>& all, int64_t rank, int64_t& not_above) {
  using M = Magnitudes<T>;
  using B = typename M::B;
  B found = 0, known = 0;
  not_above = 0;
  for (int shift = M::kBits; shift > 0;) {
    const int width = min(shift, M::kDigit);
    shift -= width;
    int64_t count[1 << M::kDigit] = {};
    const B mask = static_cast<B>((B{1} << width) - 1);
    all.each([&](B bits) {
      if ((bits & known) == found) ++count[(bits >> shift) & mask];
    });
    B digit = 0;
    while (not_above + count[digit] <= rank) not_above += count[digit++];
    found |= digit << shift, known |= mask << shift;
    if (shift == 0) not_above += count[digit];
  }
  return bit_cast<T>(found);
}

// torch.quantile of a sample's |x_0|: the one rank between two numbers is found by a line between them.
template <class T>
T quantile(const Magnitudes<T>& all, double q) {
  using B = typename Magnitudes<T>::B;
  bool has_nan = false;
  all.each([&](B bits) { has_nan |= bit_cast<T>(bits) != bit_cast<T>(bits); });
  if (has_nan) return T(__builtin_nan(""));
  const double rank = q * static_cast<double>(all.size - 1);
  const int64_t below = static_cast<int64_t>(rank);
  int64_t not_above;
  const T low = of_rank(all, below, not_above);
  T high = low;
  if (static_cast<double>(below) < rank && not_above == below + 1) {
    B next = bit_cast<B>(T(__builtin_inf()));
    all.each([&](B bits) { next = bits > bit_cast<B>(low) ? min(next, bits) : next; });
    high = bit_cast<T>(next);
  }
  if (low == high) return low;  // infinity too
  return static_cast<T>(low + (rank - static_cast<double>(below)) * (static_cast<double>(high) - low));
}

template <class T>
void find_bounds(const SamplerStepParams& p) {
  for (int64_t sample = 0; sample < p.samples; ++sample) p.bound[sample] = 1;
  T* magnitudes = static_cast<T*>(p.magnitudes);
  for_each_block<T>(p, [&](int64_t sample, int64_t, int64_t first, int64_t n, const Plan<T>& k, Blocks<T>& b) {
    const T* term[kStepTerms];
    fetch_terms(p, k, k.before, sample, first, n, b, term);
    T* to = magnitudes + sample * p.size + first;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      Vec<T> x0{};
      for (int t = 0; t < k.before; ++t)
        if (k.x0[t] != 0) x0 += k.x0[t] * load(term[t] + i, n - i);
      store(to + i, abs<T>(x0), n - i);
    }
  });
  parallel_for(p.samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      const double s = quantile(Magnitudes<T>{magnitudes + sample * p.size, p.size}, p.threshold);
      p.bound[sample] = s < 1 ? 1 : s > p.clip ? p.clip : s;  // nan stays nan
    }
  });
}

template <class T>
void run(const SamplerStepParams& p) {
  if (p.factor) find_factors<T>(p);
  if (p.bound) find_bounds<T>(p);
  for_each_block<T>(p, [&](int64_t sample, int64_t, int64_t first, int64_t n, const Plan<T>& plan, Blocks<T>& b) {
    step_block(p, plan, sample, first, n, b);
  });
}

}  // namespace

void sampler_step_kernel(const SamplerStepParams& p) {
  if constexpr (kVectorBytes == 16)
    if (p.dtype == Dtype::f64) return run<double>(p);
  run<float>(p);
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
