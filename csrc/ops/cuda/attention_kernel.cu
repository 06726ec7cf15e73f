// attention's forward on tensor cores (mma.sync, sm_80 and later; attention_sm90_kernel.cu is faster at what it takes).
// A block takes some queries of one head; each of its warps keeps the scores, the running softmax and the output of its
// own rows in registers. The queries lie in shared memory throughout; keys and values pass through two stages there:
// while one is multiplied, the other is filled. Head dims above 256 pass in pieces, and two blocks share the output.
//
// Predicted, not measured: microseconds on an H200 (132 SMs, 1.75 GHz; 1024 products, 16 exponentials and 128 bytes of
// shared memory a cycle) in bf16, for whole waves of blocks, where attention_sm90_kernel.cu does not take the call:
//   (B, H, Lq, Lk, D)          tensor cores  exponentials  shared memory
//   (1, 10, 4096, 4096, 64)    150           75            112
//   (2, 24, 1024, 1024, 128)   75            19            66
//   (1, 8, 4096, 77, 40)       2             1             1
//   (1, 1, 4096, 4096, 512)    225           19            431: one row tile a warp reads all of k for 16 queries
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
  static constexpr int kKeys = kHalf && kBucket == 64 ? 64 : kBucket > (kHalf ? 256 : 128) ? 16 : 32;
  static constexpr int kPieces = Pieces<kBucket>::kCount, kPiece = Pieces<kBucket>::kWidth;
  static constexpr int kStages = !kHalf && kPieces > 1 ? 1 : 2;
  static constexpr int kRow = kRowOf<S, kBucket>, kPieceRow = kRowOf<S, kPiece>;
  static constexpr int kTile = kKeys * kPieceRow;
  static constexpr int kSharedBytes = (kQueries * kRow + 2 * kStages * kTile) * static_cast<int>(sizeof(S));
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

  // A step brings one piece of some keys, the last of them with the piece of their values that is ours.
  const int ours = T::kPieces == 1 ? 0 : static_cast<int>(blockIdx.y) * T::kPiece;
  const auto fill_stage = [&](int stage, int64_t step) {
    S* const k_tile = stages + 2 * stage * T::kTile;
    const int64_t n0 = step / T::kPieces * T::kKeys;
    const int valid = static_cast<int>(min(p.k_len - n0, int64_t{T::kKeys}));
    const auto bring = [&](S* tile, const S* from, int64_t stride, int column) {
      fill<T::kThreads, T::kPieceRow>(tile, from + n0 * stride + column, stride, T::kKeys, valid,
                                      shape.columns(column, T::kPiece));
    };
    const int piece = static_cast<int>(step % T::kPieces);
    bring(k_tile, k, p.k.row_stride, piece * T::kPiece);
    if (piece == T::kPieces - 1) bring(k_tile + T::kTile, v, p.v.row_stride, ours);
  };

  const int warp = threadIdx.x / 32;
  const int row0 = warp * T::kRowTiles * 16;  // this warp's first
  S* const rows = q_tile + row0 * kRow;
  const float scale = static_cast<float>(p.scale), inverse_scale = static_cast<float>(1 / p.scale);
  const float scale_log2 = scale * kLog2E;
  float s[T::kRowTiles][T::kKeys / 8][4], out[T::kRowTiles][T::kPiece / 8][4] = {};
  RunningSoftmax softmax[T::kRowTiles];

  const int queries = static_cast<int>(min(p.q_len - m0, int64_t{T::kQueries}));
  const int64_t tiles = stop > 0 ? (stop + T::kKeys - 1) / T::kKeys : 0;
  if (tiles > 0) fill<T::kThreads, kRow>(q_tile, q, p.q.row_stride, T::kQueries, queries, shape);
  for_steps<T::kStages>(tiles * T::kPieces, fill_stage, [&](int stage, int64_t step) {
    const S* const k_tile = stages + 2 * stage * T::kTile;
    const int64_t n0 = step / T::kPieces * T::kKeys;
    const int piece = static_cast<int>(step % T::kPieces), column = piece * T::kPiece;
    if (piece == 0) set_to_zero(s);
    add_rows_by_rows<S, kRow, T::kRowTiles, T::kKeys, T::kPieceRow>(s, rows + column, k_tile,
                                                                    shape.columns(column, T::kPiece).width);
    if (piece < T::kPieces - 1) return;
    const bool whole = n0 + T::kKeys <= p.k_len && (!p.causal || n0 + T::kKeys - 1 <= m0 + row0 + diagonal);
#pragma unroll
    for (int i = 0; i < T::kRowTiles; ++i) {
      if (!whole || mask.kind != AttentionMaskKind::none)
        mask_scores<false, T::kKeys>(s[i], p, mask, m0 + row0 + i * 16, n0, inverse_scale);
      float shrink[2];
      softmax[i].take(s[i], scale_log2, shrink);
      multiply_rows(out[i], shrink);
    }
    add_accumulators_by_rows<S, T::kPieceRow, T::kRowTiles, T::kKeys, T::kPiece>(out, s, k_tile + T::kTile,
                                                                                 shape.columns(ours, T::kPiece).width);
  });

#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
    const int64_t m = m0 + row0 + i * 16;
    const int valid = static_cast<int>(min(p.q_len - m, int64_t{16}));
    float factor[2];
    softmax[i].finish(static_cast<float*>(p.lse) + head * p.q_len + m, ours == 0 ? valid : 0, scale, factor);
    S* const to = static_cast<S*>(p.out.p) + b * p.out.batch_stride + h * p.out.head_stride + m * p.out.row_stride;
    store_rows<T::kPiece>(rows + i * 16 * kRow, to + ours, p.out.row_stride, valid, shape.columns(ours, T::kPiece),
                          out[i], factor[0], factor[1]);
  }
}

template <class S, int kBucket>
cudaError_t run(const AttentionParams& p, cudaStream_t stream) {
  using T = Traits<S, kBucket>;
  const bool aligned = forward_rows_aligned<S>(p);
  const int64_t blocks = (p.q_len + T::kQueries - 1) / T::kQueries * p.batch * p.heads;
  return launch(forward_kernel<S, kBucket>, dim3(static_cast<unsigned>(blocks), T::kPieces), T::kThreads,
                T::kSharedBytes, stream, p, aligned);
}

}  // namespace

cudaError_t attention_kernel(const AttentionParams& p, cudaStream_t stream) {
  return dispatch_element(p.dtype, [&]<class S>() {
    return dispatch_head_dim(p.head_dim, [&]<int kBucket>() { return run<S, kBucket>(p, stream); });
  });
}

}  // namespace imagegen::cuda
