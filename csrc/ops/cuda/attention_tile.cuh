// What attention's kernels share: tiles of rows in shared memory, products of tiles on tensor cores, the mask.
#pragma once
#include "common/copy_async.cuh"
#include "common/launch.cuh"
#include "common/mma_product.cuh"
#include "common/scalar.cuh"
#include "ops/attention.h"

namespace imagegen::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() {
  return __int_as_float(0xFF800000);
}

// A tile's rows in shared memory are kBucket elements and 16 bytes apart: eight rows then begin in different banks.
template <class S, int kBucket>
constexpr int kRowOf = kBucket + 16 / static_cast<int>(sizeof(S));

// Whether rows can be read and written 16 bytes at a time.
template <class S, class Void>
bool rows_aligned(const AttentionTensor<Void>& t, int64_t head_dim) {
  const auto whole = [](int64_t elements) { return elements * sizeof(S) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.p) % 16 == 0 && whole(t.batch_stride) && whole(t.head_stride) &&
         whole(t.row_stride) && whole(head_dim);
}

template <class S>
bool forward_rows_aligned(const AttentionParams& p) {
  return rows_aligned<S>(p.q, p.head_dim) && rows_aligned<S>(p.k, p.head_dim) && rows_aligned<S>(p.v, p.head_dim) &&
         rows_aligned<S>(p.out, p.head_dim);
}

// How the block reads rows of D elements: in shared memory they are `width` long, D rounded up to a product's depth.
struct RowsShape {
  int head_dim, width;
  bool aligned;
  // Of `count` columns from `first` on.
  __device__ __forceinline__ RowsShape columns(int first, int count) const {
    return {max(0, min(head_dim - first, count)), max(0, min(width - first, count)), aligned};
  }
};

// Rows above 256 pass by in pieces of 256 columns, and a block owns one piece of what it sums: more accumulators do not
// fit in registers. The blocks of the other piece compute the same scores again, half as many products more.
constexpr int kWidestPiece = 256;
template <int kBucket>
struct Pieces {
  static constexpr int kWidth = kBucket < kWidestPiece ? kBucket : kWidestPiece, kCount = kBucket / kWidth;
  static_assert(kBucket % kWidth == 0);
};

// Goes through the steps of a block, each with what fill(stage, step) has brought, while the next is on its way.
template <int kStages, class Fill, class Each>
__device__ __forceinline__ void for_steps(int64_t steps, const Fill& fill, const Each& each) {
  const auto begin = [&](int stage, int64_t step) {
    fill(stage, step);
    copy_async_commit();
  };
  if (steps > 0) begin(0, 0);
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<0>();
    __syncthreads();  // this stage is there, and everyone is done with the other
    const bool more = step + 1 < steps;
    if (kStages == 2 && more) begin(stage ^ 1, step + 1);
    each(stage, step);
    if (kStages == 2) {
      stage ^= 1;
    } else if (more) {
      __syncthreads();
      begin(0, step + 1);
    }
  }
}

// Brings `rows` rows to a tile, zeros for those from `valid` on and from D on; asynchronously where rows are aligned.
template <int kThreads, int kRow, class S>
__device__ __forceinline__ void fill(S* tile, const S* from, int64_t stride, int rows, int valid, RowsShape shape) {
  constexpr int kLanes = 8;  // that share a row
  const int step = shape.aligned ? 16 / static_cast<int>(sizeof(S)) : 1;
  for (int r = threadIdx.x / kLanes; r < rows; r += kThreads / kLanes)
    for (int d = threadIdx.x % kLanes * step; d < shape.width; d += kLanes * step) {
      const bool inside = r < valid && d < shape.head_dim;
      const S* source = inside ? from + r * stride + d : from;
      if (shape.aligned)
        copy_async(tile + r * kRow + d, source, inside);
      else
        tile[r * kRow + d] = inside ? *source : S{};
    }
}

// Rounds a warp's 16 rows of accumulators, each times its factor, to S and writes those before `valid`, by way of rows
// of a tile that this warp alone still uses: 16 bytes at a time and whole rows one after another.
template <int kBucket, class S>
__device__ __forceinline__ void store_rows(S* tile, S* to, int64_t stride, int valid, RowsShape shape,
                                           const float (&c)[kBucket / 8][4], float factor, float factor8) {
  constexpr int kRow = kRowOf<S, kBucket>;
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kBucket / 8; ++j) {
    if (j * 8 >= shape.width) continue;
    S* const at = tile + group * kRow + j * 8 + t * 2;
    at[0] = from_compute<S>(c[j][0] * factor), at[1] = from_compute<S>(c[j][1] * factor);
    at[8 * kRow] = from_compute<S>(c[j][2] * factor8), at[8 * kRow + 1] = from_compute<S>(c[j][3] * factor8);
  }
  __syncwarp();
  const int step = shape.aligned ? 16 / static_cast<int>(sizeof(S)) : 1;
  for (int r = lane / 8; r < min(16, valid); r += 4)
    for (int d = lane % 8 * step; d < shape.head_dim; d += 8 * step)
      if (shape.aligned)
        *reinterpret_cast<uint4*>(to + r * stride + d) = *reinterpret_cast<const uint4*>(tile + r * kRow + d);
      else
        to[r * stride + d] = tile[r * kRow + d];
  __syncwarp();
}

// What of the mask this block sees: one head of one batch; strides in bytes.
struct MaskOfHead {
  AttentionMaskKind kind;
  Dtype dtype;
  const char* p;
  int64_t q_stride, k_stride;
};
__device__ __forceinline__ MaskOfHead mask_of(const AttentionMask& mask, int64_t b, int64_t h) {
  const int64_t size = mask.kind == AttentionMaskKind::boolean ? 1 : mask.dtype == Dtype::f32 ? 4 : 2;
  return {mask.kind, mask.dtype,
          static_cast<const char*>(mask.p) + (b * mask.batch_stride + h * mask.head_stride) * size,
          mask.q_stride * size, mask.k_stride * size};
}

// A score with the mask's value added, before it is multiplied by the scale.
__device__ __forceinline__ float masked(float s, bool shown, float) {
  return shown ? s : minus_infinity();
}
template <class M>
__device__ __forceinline__ float masked(float s, M value, float inverse_scale) {
  const float x = to_compute(value);
  // The least float, which others write for a hidden key, must not become an infinity: a row of it is a mean.
  return x == minus_infinity() ? x : s + fmaxf(x * inverse_scale, -1e38f * fminf(inverse_scale, 1.f));
}

// The columns of a row that are not hidden by their position, counted from this lane's first.
struct Shown {
  int begin, end;
  __device__ __forceinline__ bool operator()(int column) const { return begin <= column && column < end; }
};

// Masks the half of a warp's scores that is in rows group (kHalf = 0) or group + 8. `at`: the mask of this lane's first
// column; `step`: bytes to the next. Addresses are stepped along: all of them at once would not fit in registers.
template <class M, int kHalf, int kTiles>
__device__ __forceinline__ void mask_row(float (&s)[kTiles][4], Shown shown, const char* at, int64_t step,
                                         float inverse_scale) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j, at += 8 * step)
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (shown(j * 8 + c))
        s[j][2 * kHalf + c] = masked(s[j][2 * kHalf + c], *reinterpret_cast<const M*>(at + c * step), inverse_scale);
}
template <int kHalf, int kTiles>
__device__ __forceinline__ void mask_row(float (&s)[kTiles][4], Shown shown, const MaskOfHead& mask, const char* at,
                                         int64_t step, float inverse_scale) {
  if (mask.kind == AttentionMaskKind::boolean)
    mask_row<bool, kHalf>(s, shown, at, step, inverse_scale);
  else if (mask.dtype == Dtype::f32)
    mask_row<float, kHalf>(s, shown, at, step, inverse_scale);
  else if (mask.dtype == Dtype::bf16)
    mask_row<bf16, kHalf>(s, shown, at, step, inverse_scale);
  else
    mask_row<fp16, kHalf>(s, shown, at, step, inverse_scale);
}

// Masks a warp's scores: 16 rows from row0 on, kColumns columns from column0 on. Queries from q_len on have none.
template <bool kRowsAreKeys, int kColumns, int kHalf = 0>
__device__ __forceinline__ void mask_scores(float (&s)[kColumns / 8][4], const AttentionParams& p,
                                            const MaskOfHead& mask, int64_t row0, int64_t column0,
                                            float inverse_scale) {
  const int lane = threadIdx.x % 32;
  const int64_t diagonal = p.k_len - p.q_len, row = row0 + lane / 4 + kHalf * 8, column = column0 + lane % 4 * 2;
  int64_t begin = 0, end = kRowsAreKeys ? p.q_len : p.k_len;
  if (p.causal && kRowsAreKeys) begin = row - diagonal;
  if (p.causal && !kRowsAreKeys) end = min(end, row + diagonal + 1);
  if (row >= (kRowsAreKeys ? p.k_len : p.q_len)) end = 0;
  const auto counted = [&](int64_t n) { return static_cast<int>(max(min(n - column, int64_t{kColumns}), int64_t{0})); };
  const Shown shown{kRowsAreKeys ? counted(begin) : 0, counted(end)};
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (!shown(j * 8 + c)) s[j][2 * kHalf + c] = minus_infinity();
  if (mask.kind != AttentionMaskKind::none) {
    const int64_t row_step = kRowsAreKeys ? mask.k_stride : mask.q_stride;
    const int64_t step = kRowsAreKeys ? mask.q_stride : mask.k_stride;
    mask_row<kHalf>(s, shown, mask, mask.p + row * row_step + column * step, step, inverse_scale);
  }
  if constexpr (kHalf == 0) mask_scores<kRowsAreKeys, kColumns, 1>(s, p, mask, row0, column0, inverse_scale);
}

// The running softmax of a warp's 16 rows: of rows group and group + 8 the largest score so far and the sum over this
// lane's columns.
struct RunningSoftmax {
  float top[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};

  // Takes in more scores, which become exp(scale (score - top)). shrink: what is to become of the rows' sums so far.
  template <int kTiles>
  __device__ __forceinline__ void take(float (&s)[kTiles][4], float scale_log2, float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float new_top = top[r];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) new_top = fmaxf(new_top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      new_top = fmaxf(new_top, __shfl_xor_sync(~0u, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(~0u, new_top, 2));
      const float shift = new_top == minus_infinity() ? 0.f : new_top * scale_log2;
      shrink[r] = exp2_approximate(top[r] * scale_log2 - shift);
      top[r] = new_top;
      sum[r] *= shrink[r];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          s[j][c] = exp2_approximate(s[j][c] * scale_log2 - shift);
          sum[r] += s[j][c];
        }
    }
  }

  // The factors that make the sums means, 0 for rows without a key; writes the log-sum-exp of the first `valid` rows.
  __device__ __forceinline__ void finish(float* lse, int valid, float scale, float (&factor)[2]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      factor[r] = total == 0.f ? 0.f : 1.f / total;
      const int row = lane / 4 + r * 8;
      if (lane % 4 == 0 && row < valid) lse[row] = top[r] * scale + logf(total);
    }
  }
};

template <int kRowTiles, int kTiles>
__device__ __forceinline__ void set_to_zero(float (&c)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0.f;
}

template <int kTiles>
__device__ __forceinline__ void multiply_rows(float (&c)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] *= factor[i / 2];
}

// c += a b^T over the head dim: kRowTiles x 16 rows of a, kRow apart, times kColumns rows of b, kRowOfB apart.
template <class S, int kRow, int kRowTiles, int kColumns, int kRowOfB = kRow>
__device__ __forceinline__ void add_rows_by_rows(float (&c)[kRowTiles][kColumns / 8][4], const S* a, const S* b,
                                                 int width) {
  using P = Product<S>;
#pragma unroll 2
  for (int d = 0; d < width; d += P::kDepth) {
    typename P::A rows[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) rows[i] = P::rows(a + i * 16 * kRow + d, kRow);
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const typename P::B columns = P::transposed(b + j * 16 * kRowOfB + d, kRowOfB);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) P::add(c[i] + 2 * j, rows[i], columns);
    }
  }
}

// c += a b: a are accumulators, rounded to S, of kInner columns; b has kInner rows of `width` elements.
template <class S, int kRow, int kRowTiles, int kInner, int kBucket>
__device__ __forceinline__ void add_accumulators_by_rows(float (&c)[kRowTiles][kBucket / 8][4],
                                                         const float (&a)[kRowTiles][kInner / 8][4], const S* b,
                                                         int width) {
  using P = Product<S>;
#pragma unroll
  for (int k = 0; k < kInner; k += P::kDepth) {
    typename P::A rows[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) rows[i] = P::accumulators(a[i] + k / 8);
#pragma unroll
    for (int d = 0; d < kBucket; d += 16) {
      if (d >= width) continue;
      const typename P::B columns = P::straight(b + k * kRow + d, kRow);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) P::add(c[i] + d / 8, rows[i], columns);
    }
  }
}

// The smallest bucket of head dims that holds D, and what the kernel of that bucket returns.
template <class F>
cudaError_t dispatch_head_dim(int64_t head_dim, const F& f) {
  if (head_dim <= 64) return f.template operator()<64>();
  if (head_dim <= 128) return f.template operator()<128>();
  if (head_dim <= 256) return f.template operator()<256>();
  return f.template operator()<512>();
}

}  // namespace
}  // namespace imagegen::cuda
