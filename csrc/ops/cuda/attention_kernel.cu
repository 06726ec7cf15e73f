// attention's forward on tensor cores (mma.sync, sm_80 and later; attention_sm90_kernel.cu is faster at what it takes).
// A block takes some queries of one head; each of its warps keeps the scores, the running softmax and the output of its
// own rows in registers. The queries lie in shared memory throughout; keys and values pass through two stages there:
// while one is multiplied, the other is filled.
#include "attention_tile.cuh"

namespace imagegen::cuda {
namespace {

template <class S, int kBucket>
struct Traits {
  static constexpr bool kHalf = sizeof(S) == 2;
  // Two row tiles a warp halve what it reads of keys and values from shared memory, whose bandwidth is the limit with
  // one; above 128 the output of two does not fit in registers.
  static constexpr int kRowTiles = kHalf && kBucket <= 128 ? 2 : 1;
  static constexpr int kWarps = !kHalf && kBucket > 128 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueries = kWarps * kRowTiles * 16;
  static constexpr int kKeys = kHalf && kBucket == 64 ? 64 : !kHalf && kBucket > 128 ? 16 : 32;
  static constexpr int kRow = kRowOf<S, kBucket>;
  static constexpr int kStage = 2 * kKeys * kRow;
  static constexpr int kSharedBytes = (kQueries * kRow + 2 * kStage) * static_cast<int>(sizeof(S));
  static_assert(kRow * sizeof(S) % 16 == 0, "rows begin where 16-byte copies may");
  static_assert(kRow * sizeof(S) / 16 % 8 == 1 || !kHalf, "eight rows of a matrix lie in different banks");
  static_assert(kKeys % 16 == 0 && kKeys % Product<S>::kDepth == 0, "whole operands");
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a block");
};

template <class S, int kBucket>
__global__ void __launch_bounds__((Traits<S, kBucket>::kThreads), 1)
    forward_kernel(const __grid_constant__ AttentionParams p, bool aligned) {
  using T = Traits<S, kBucket>;
  constexpr int kRow = T::kRow;
  S* const q_tile = dynamic_shared<S>();
  S* const stages = q_tile + T::kQueries * kRow;

  const int64_t q_tiles = (p.q_len + T::kQueries - 1) / T::kQueries, head = blockIdx.x / q_tiles;
  const int64_t b = head / p.heads, h = head % p.heads, kv_h = h / (p.heads / p.kv_heads);
  // Under a causal mask the last tiles are the longest: they start first.
  const int64_t m0 = (q_tiles - 1 - blockIdx.x % q_tiles) * T::kQueries;
  const S* const q = static_cast<const S*>(p.q.p) + b * p.q.batch_stride + h * p.q.head_stride + m0 * p.q.row_stride;
  const S* const k = static_cast<const S*>(p.k.p) + b * p.k.batch_stride + kv_h * p.k.head_stride;
  const S* const v = static_cast<const S*>(p.v.p) + b * p.v.batch_stride + kv_h * p.v.head_stride;
  const MaskOfHead mask = mask_of(p.mask, b, h);
  const int head_dim = static_cast<int>(p.head_dim);
  const RowsShape shape{head_dim, (head_dim + 15) / 16 * 16, aligned};
  const int64_t diagonal = p.k_len - p.q_len;
  const int64_t stop = p.causal ? min(p.k_len, m0 + T::kQueries + diagonal) : p.k_len;

  const auto fill_stage = [&](int stage, int64_t n0) {
    S* const k_tile = stages + stage * T::kStage;
    const int valid = static_cast<int>(min(p.k_len - n0, int64_t{T::kKeys}));
    fill<T::kThreads, kRow>(k_tile, k + n0 * p.k.row_stride, p.k.row_stride, T::kKeys, valid, shape);
    fill<T::kThreads, kRow>(k_tile + T::kKeys * kRow, v + n0 * p.v.row_stride, p.v.row_stride, T::kKeys, valid, shape);
    copy_async_commit();
  };

  const int warp = threadIdx.x / 32;
  const int row0 = warp * T::kRowTiles * 16;  // this warp's first
  S* const rows = q_tile + row0 * kRow;
  const float scale = static_cast<float>(p.scale), inverse_scale = static_cast<float>(1 / p.scale);
  const float scale_log2 = scale * kLog2E;
  float out[T::kRowTiles][kBucket / 8][4] = {};
  RunningSoftmax softmax[T::kRowTiles];

  const int queries = static_cast<int>(min(p.q_len - m0, int64_t{T::kQueries}));
  fill<T::kThreads, kRow>(q_tile, q, p.q.row_stride, T::kQueries, queries, shape);
  if (stop > 0) fill_stage(0, 0);
  int stage = 0;
  for (int64_t n0 = 0; n0 < stop; n0 += T::kKeys, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this stage is there, and everyone is done with the other
    if (n0 + T::kKeys < stop) fill_stage(stage ^ 1, n0 + T::kKeys);
    const S* const k_tile = stages + stage * T::kStage;

    float s[T::kRowTiles][T::kKeys / 8][4] = {};
    add_rows_by_rows<S, kRow, T::kRowTiles, T::kKeys>(s, rows, k_tile, shape.width);
    const bool whole = n0 + T::kKeys <= p.k_len && (!p.causal || n0 + T::kKeys - 1 <= m0 + row0 + diagonal);
#pragma unroll
    for (int i = 0; i < T::kRowTiles; ++i) {
      if (!whole || mask.kind != AttentionMaskKind::none)
        mask_scores<false, T::kKeys>(s[i], p, mask, m0 + row0 + i * 16, n0, inverse_scale);
      float shrink[2];
      softmax[i].take(s[i], scale_log2, shrink);
      multiply_rows(out[i], shrink);
    }
    add_accumulators_by_rows<S, kRow, T::kRowTiles, T::kKeys, kBucket>(out, s, k_tile + T::kKeys * kRow, shape.width);
  }
  if (stop <= 0) {  // the queries, whose rows are written over now, may still be on their way
    copy_async_wait<0>();
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
    const int64_t m = m0 + row0 + i * 16;
    const int valid = static_cast<int>(min(p.q_len - m, int64_t{16}));
    float factor[2];
    softmax[i].finish(static_cast<float*>(p.lse) + head * p.q_len + m, valid, scale, factor);
    S* const to = static_cast<S*>(p.out.p) + b * p.out.batch_stride + h * p.out.head_stride + m * p.out.row_stride;
    store_rows<kBucket>(rows + i * 16 * kRow, to, p.out.row_stride, valid, shape, out[i], factor[0], factor[1]);
  }
}

template <class S, int kBucket>
cudaError_t run(const AttentionParams& p, cudaStream_t stream) {
  using T = Traits<S, kBucket>;
  const bool aligned = forward_rows_aligned<S>(p);
  const int64_t blocks = (p.q_len + T::kQueries - 1) / T::kQueries * p.batch * p.heads;
  return launch(forward_kernel<S, kBucket>, dim3(static_cast<unsigned>(blocks)), T::kThreads, T::kSharedBytes, stream,
                p, aligned);
}

}  // namespace

cudaError_t attention_kernel(const AttentionParams& p, cudaStream_t stream) {
  return dispatch_element(p.dtype, [&]<class S>() {
    return dispatch_head_dim(p.head_dim, [&]<int kBucket>() { return run<S, kBucket>(p, stream); });
  });
}

}  // namespace imagegen::cuda
