// attention's backward on tensor cores (mma.sync, sm_80 and later). With p = exp(s - lse), recomputed, and
// ds = p (grad v^T - delta):
//   dq = scale ds k      a block holds queries, keys and values pass by
//   dv = p^T grad        a block holds keys and values, queries and their gradients pass by
//   dk = scale ds^T q
//   dmask = ds           a block holds a tile of the mask, whatever it is broadcast along passes by
// Each is summed by one block in one order: no atomics, the same bits every time.
#include "attention_tile.cuh"
#include "common/ceil_div.h"

namespace imagegen::cuda {
namespace {

template <class S, int kBucketSize>
struct Traits {
  static constexpr int kBucket = kBucketSize;
  static constexpr bool kHalf = sizeof(S) == 2, kWide = kBucket > 128;
  static constexpr int kPieces = Pieces<kBucket>::kCount, kPiece = Pieces<kBucket>::kWidth;
  static constexpr int kWarps = (!kHalf && kWide ? 2 : 4) / kPieces;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kWarps * 16;  // held: 16 for each warp
  // Of a stage: as many as fit beside what is held.
  static constexpr int kColumns = kHalf && !kWide ? 32 : !kHalf && kBucket == 64 ? 32 : 16;
  static constexpr int kStages = !kHalf && kWide ? 1 : 2;
  static constexpr int kRow = kRowOf<S, kBucket>, kPieceRow = kRowOf<S, kPiece>;
  static constexpr int kHeld = kRows * kRow, kPassing = kColumns * kPieceRow;  // elements of one matrix
  static constexpr int kSharedBytes = 2 * (kHeld + kStages * kPassing) * static_cast<int>(sizeof(S));
  static_assert(kRow * sizeof(S) % 16 == 0, "rows begin where 16-byte copies may");
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a block");
};

template <class S>
struct Matrix {
  const S* p;
  int64_t stride, rows;
};
template <class S>
__device__ __forceinline__ Matrix<S> matrix(const AttentionInput& t, int64_t b, int64_t h, int64_t rows) {
  return {static_cast<const S*>(t.p) + b * t.batch_stride + h * t.head_stride, t.row_stride, rows};
}

// Two matrices whose rows from `first` on the block holds, and two whose rows pass by in stages, piece by piece.
template <class T, class S>
struct Tiles {
  S* const shared;
  const RowsShape shape;

  __device__ __forceinline__ S* held(int i) const { return shared + i * T::kHeld; }
  __device__ __forceinline__ S* passing(int stage, int i) const {
    return shared + 2 * T::kHeld + (2 * stage + i) * T::kPassing;
  }
  __device__ __forceinline__ RowsShape piece(int i) const { return shape.columns(i * T::kPiece, T::kPiece); }
  __device__ __forceinline__ void hold(const Matrix<S>& a, const Matrix<S>& b, int64_t first) const {
    bring<T::kRow>(held(0), a, first, T::kRows, 0, shape);
    bring<T::kRow>(held(1), b, first, T::kRows, 0, shape);
  }
  __device__ __forceinline__ void pass(int stage, const Matrix<S>& a, const Matrix<S>& b, int64_t first, int i) const {
    bring<T::kPieceRow>(passing(stage, 0), a, first, T::kColumns, i * T::kPiece, piece(i));
    bring<T::kPieceRow>(passing(stage, 1), b, first, T::kColumns, i * T::kPiece, piece(i));
  }
  // c += rows of what is held, from this one on, times those of the stage.
  __device__ __forceinline__ void multiply(float (&c)[1][T::kColumns / 8][4], int matrix, int row, int stage,
                                           int i) const {
    add_rows_by_rows<S, T::kRow, 1, T::kColumns, T::kPieceRow>(c, held(matrix) + row * T::kRow + i * T::kPiece,
                                                               passing(stage, matrix), piece(i).width);
  }

 private:
  template <int kRow>
  __device__ __forceinline__ void bring(S* tile, const Matrix<S>& m, int64_t first, int rows, int column,
                                        RowsShape columns) const {
    const int valid = static_cast<int>(max(int64_t{0}, min(m.rows - first, int64_t{rows})));
    fill<T::kThreads, kRow>(tile, m.p + (valid ? first * m.stride + column : 0), m.stride, rows, valid, columns);
  }
};

// Calls each(stage, first, piece) for the tiles of rows [first, stop) of a and b, the next one already on its way. Of
// two pieces `last` comes last.
template <class T, class S, class Each>
__device__ __forceinline__ void for_tiles(const Tiles<T, S>& tiles, const Matrix<S>& a, const Matrix<S>& b,
                                          int64_t first, int64_t stop, int last, const Each& each) {
  const auto row = [&](int64_t step) { return first + step / T::kPieces * T::kColumns; };
  const auto piece = [&](int64_t step) { return static_cast<int>((step + 1 + last) % T::kPieces); };
  const int64_t steps = first < stop ? (stop - first + T::kColumns - 1) / T::kColumns * T::kPieces : 0;
  for_steps<T::kStages>(
      steps, [&](int stage, int64_t step) { tiles.pass(stage, a, b, row(step), piece(step)); },
      [&](int stage, int64_t step) { each(stage, row(step), piece(step)); });
  __syncthreads();
}

// lse as the exponent's offset; a query without a key has minus infinity, and its scores are that already.
__device__ __forceinline__ float offset_of(float lse) {
  return lse == minus_infinity() ? 0.f : lse * kLog2E;
}

template <class S, int kBucket>
__global__ void __launch_bounds__((Traits<S, kBucket>::kThreads), 1)
    query_gradient_kernel(const __grid_constant__ AttentionParams p, bool aligned) {
  using T = Traits<S, kBucket>;
  constexpr int kRow = T::kRow;
  const int head_dim = static_cast<int>(p.head_dim);
  const Tiles<T, S> tiles{dynamic_shared<S>(), {head_dim, (head_dim + 15) / 16 * 16, aligned}};
  const int64_t q_tiles = (p.q_len + T::kRows - 1) / T::kRows, head = blockIdx.x / q_tiles;
  const int64_t b = head / p.heads, h = head % p.heads, kv_h = h / (p.heads / p.kv_heads);
  const int64_t m_first = (q_tiles - 1 - blockIdx.x % q_tiles) * T::kRows;
  const Matrix<S> q = matrix<S>(p.q, b, h, p.q_len), grad = matrix<S>(p.grad, b, h, p.q_len);
  const Matrix<S> k = matrix<S>(p.k, b, kv_h, p.k_len), v = matrix<S>(p.v, b, kv_h, p.k_len);
  const MaskOfHead mask = mask_of(p.mask, b, h);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t m0 = m_first + warp * 16, diagonal = p.k_len - p.q_len;  // this warp's first query
  const int64_t stop = p.causal ? min(p.k_len, m_first + T::kRows + diagonal) : p.k_len;
  const float scale = static_cast<float>(p.scale), inverse_scale = static_cast<float>(1 / p.scale);

  tiles.hold(q, grad, m_first);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  // delta = sum over the row of grad * out.
  float offset[2], delta[2] = {}, excess[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t m = m0 + lane / 4 + r * 8;
    offset[r] = 0.f;
    if (m < p.q_len) {
      const S* const out =
          static_cast<const S*>(p.out.p) + b * p.out.batch_stride + h * p.out.head_stride + m * p.out.row_stride;
      const S* const g = tiles.held(1) + (warp * 16 + lane / 4 + r * 8) * kRow;
      for (int d = lane % 4; d < head_dim; d += 4) delta[r] += to_compute(g[d]) * to_compute(out[d]);
      offset[r] = offset_of(static_cast<const float*>(p.lse)[head * p.q_len + m]);
    }
    delta[r] += __shfl_xor_sync(~0u, delta[r], 1);
    delta[r] += __shfl_xor_sync(~0u, delta[r], 2);
  }

  const int ours = T::kPieces == 1 ? 0 : static_cast<int>(blockIdx.y);  // the piece of dq that this block sums
  float dq[1][T::kPiece / 8][4] = {}, s[1][T::kColumns / 8][4], dp[1][T::kColumns / 8][4];
  for_tiles(tiles, k, v, 0, stop, ours, [&](int stage, int64_t n0, int piece) {
    if (T::kPieces == 1 || piece != ours) set_to_zero(s), set_to_zero(dp);
    tiles.multiply(s, 0, warp * 16, stage, piece);
    tiles.multiply(dp, 1, warp * 16, stage, piece);
    if (T::kPieces > 1 && piece != ours) return;
    mask_scores<false, T::kColumns>(s[0], p, mask, m0, n0, inverse_scale);
    float ds_sum[2] = {};
#pragma unroll
    for (int j = 0; j < T::kColumns / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[0][j][i] = exp2_approximate(s[0][j][i] * (scale * kLog2E) - offset[i / 2]);
        dp[0][j][i] -= delta[i / 2];
        ds_sum[i / 2] += s[0][j][i] * dp[0][j][i];
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ds_sum[r] += __shfl_xor_sync(~0u, ds_sum[r], 1);
      ds_sum[r] += __shfl_xor_sync(~0u, ds_sum[r], 2);
      excess[r] += ds_sum[r];
      if (stop > T::kColumns) ds_sum[r] = 0.f;  // with all keys in one tile it is known in time for dq, too
    }
#pragma unroll
    for (int j = 0; j < T::kColumns / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][j][i] *= dp[0][j][i] - ds_sum[i / 2];
    add_accumulators_by_rows<S, T::kPieceRow, 1, T::kColumns, T::kPiece>(dq, s, tiles.passing(stage, 0),
                                                                         tiles.piece(ours).width);
  });

  // delta came from the rounded output: what the ds of a row sum to, instead of 0, is its error, and mended for the
  // other kernels.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t m = m0 + lane / 4 + r * 8;
    if (lane % 4 == 0 && m < p.q_len && ours == 0) p.delta[head * p.q_len + m] = delta[r] + excess[r];
  }
  S* const to = static_cast<S*>(p.dq.p) + b * p.dq.batch_stride + h * p.dq.head_stride + m0 * p.dq.row_stride;
  const int valid = static_cast<int>(min(p.q_len - m0, int64_t{16}));
  store_rows<T::kPiece>(tiles.held(0) + warp * 16 * kRow, to + ours * T::kPiece, p.dq.row_stride, valid,
                        tiles.piece(ours), dq[0], scale, scale);
}

template <class S, int kBucket>
__global__ void __launch_bounds__((Traits<S, kBucket>::kThreads), 1)
    key_gradient_kernel(const __grid_constant__ AttentionParams p, bool aligned) {
  using T = Traits<S, kBucket>;
  constexpr int kRow = T::kRow;
  // Above 128 both gradients do not fit in registers: half of the blocks compute dv, the others dk.
  const bool dv_is_ours = !T::kWide || blockIdx.y % 2 == 0, dk_is_ours = !T::kWide || blockIdx.y % 2 == 1;
  const int ours = T::kPieces == 1 ? 0 : static_cast<int>(blockIdx.y) / 2;  // the piece of it that this block sums
  const int head_dim = static_cast<int>(p.head_dim);
  const Tiles<T, S> tiles{dynamic_shared<S>(), {head_dim, (head_dim + 15) / 16 * 16, aligned}};
  const int64_t k_tiles = (p.k_len + T::kRows - 1) / T::kRows, kv_head = blockIdx.x / k_tiles;
  const int64_t b = kv_head / p.kv_heads, kv_h = kv_head % p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t n_first = blockIdx.x % k_tiles * T::kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t n0 = n_first + warp * 16;  // this warp's first key
  const int64_t m_start = p.causal ? max(int64_t{0}, n_first + p.q_len - p.k_len) / T::kColumns * T::kColumns : 0;
  const float scale = static_cast<float>(p.scale), inverse_scale = static_cast<float>(1 / p.scale);

  tiles.hold(matrix<S>(p.k, b, kv_h, p.k_len), matrix<S>(p.v, b, kv_h, p.k_len), n_first);
  copy_async_commit();
  float dv[1][T::kPiece / 8][4] = {}, dk_beside_dv[1][T::kPiece / 8][4] = {};
  float (&dk)[1][T::kPiece / 8][4] = T::kWide ? dv : dk_beside_dv;
  float s[1][T::kColumns / 8][4], dp[1][T::kColumns / 8][4];
  for (int64_t h = kv_h * group; h < (kv_h + 1) * group; ++h) {
    const Matrix<S> q = matrix<S>(p.q, b, h, p.q_len), grad = matrix<S>(p.grad, b, h, p.q_len);
    const MaskOfHead mask = mask_of(p.mask, b, h);
    const float* const lse = static_cast<const float*>(p.lse) + (b * p.heads + h) * p.q_len;
    const float* const delta = p.delta + (b * p.heads + h) * p.q_len;
    for_tiles(tiles, q, grad, m_start, p.q_len, ours, [&](int stage, int64_t m0, int piece) {
      if (T::kPieces == 1 || piece != ours) set_to_zero(s), set_to_zero(dp);
      tiles.multiply(s, 0, warp * 16, stage, piece);
      if (T::kPieces > 1 && dk_is_ours) tiles.multiply(dp, 1, warp * 16, stage, piece);
      if (T::kPieces > 1 && piece != ours) return;
      mask_scores<true, T::kColumns>(s[0], p, mask, n0, m0, inverse_scale);
#pragma unroll
      for (int j = 0; j < T::kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t m = m0 + j * 8 + lane % 4 * 2 + i % 2;
          const float offset = m < p.q_len ? offset_of(lse[m]) : 0.f;
          s[0][j][i] = exp2_approximate(s[0][j][i] * (scale * kLog2E) - offset);
        }
      const auto add = [&](float (&sum)[1][T::kPiece / 8][4], int matrix) {
        add_accumulators_by_rows<S, T::kPieceRow, 1, T::kColumns, T::kPiece>(sum, s, tiles.passing(stage, matrix),
                                                                             tiles.piece(ours).width);
      };
      if (dv_is_ours) add(dv, 1);
      if (dk_is_ours) {
        if (T::kPieces == 1) tiles.multiply(dp, 1, warp * 16, stage, piece);  // here: fewer registers, as nothing waits
#pragma unroll
        for (int j = 0; j < T::kColumns / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t m = m0 + j * 8 + lane % 4 * 2 + i % 2;
            s[0][j][i] *= dp[0][j][i] - (m < p.q_len ? delta[m] : 0.f);
          }
        add(dk, 0);
      }
    });
  }
  if (m_start >= p.q_len) {  // no query sees these keys; the keys, whose rows are written over now, may still arrive
    copy_async_wait<0>();
    __syncthreads();
  }

  const int valid = static_cast<int>(min(p.k_len - n0, int64_t{16}));
  S* const rows = tiles.held(0) + warp * 16 * kRow;
  const auto to = [&](const AttentionOutput& t) {
    return static_cast<S*>(t.p) + b * t.batch_stride + kv_h * t.head_stride + n0 * t.row_stride + ours * T::kPiece;
  };
  const RowsShape piece = tiles.piece(ours);
  if (dv_is_ours) store_rows<T::kPiece>(rows, to(p.dv), p.dv.row_stride, valid, piece, dv[0], 1.f, 1.f);
  if (dk_is_ours) store_rows<T::kPiece>(rows, to(p.dk), p.dk.row_stride, valid, piece, dk[0], scale, scale);
}

__device__ __forceinline__ void store_mask_gradient(const AttentionParams& p, int64_t i, float x) {
  if (p.mask.dtype == Dtype::f32)
    static_cast<float*>(p.dmask)[i] = x;
  else if (p.mask.dtype == Dtype::bf16)
    static_cast<bf16*>(p.dmask)[i] = from_compute<bf16>(x);
  else
    static_cast<fp16*>(p.dmask)[i] = from_compute<fp16>(x);
}

template <class S, int kBucket>
__global__ void __launch_bounds__((Traits<S, kBucket>::kThreads), 1)
    mask_gradient_kernel(const __grid_constant__ AttentionParams p, bool aligned) {
  using T = Traits<S, kBucket>;
  const int head_dim = static_cast<int>(p.head_dim);
  const Tiles<T, S> tiles{dynamic_shared<S>(), {head_dim, (head_dim + 15) / 16 * 16, aligned}};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = static_cast<float>(p.scale), inverse_scale = static_cast<float>(1 / p.scale);
  const int64_t* const size = p.mask_size;
  const int64_t q_tiles = (size[2] + T::kRows - 1) / T::kRows, k_tiles = (size[3] + T::kColumns - 1) / T::kColumns;
  const int64_t mask_head = blockIdx.x / (q_tiles * k_tiles), mask_b = mask_head / size[1],
                mask_h = mask_head % size[1];
  const int64_t mask_m = blockIdx.x / k_tiles % q_tiles * T::kRows, mask_n = blockIdx.x % k_tiles * T::kColumns;
  // What the mask is broadcast along is summed over.
  const bool sums_queries = size[2] == 1, sums_keys = size[3] == 1;
  const int64_t b_stop = size[0] == 1 ? p.batch : mask_b + 1, h_stop = size[1] == 1 ? p.heads : mask_h + 1;
  const int64_t m_stop = sums_queries ? p.q_len : mask_m + 1, n_stop = sums_keys ? p.k_len : mask_n + 1;

  float sum[T::kColumns / 8][4] = {}, s[1][T::kColumns / 8][4], dp[1][T::kColumns / 8][4];
  for (int64_t b = mask_b; b < b_stop; ++b)
    for (int64_t h = mask_h; h < h_stop; ++h) {
      const int64_t kv_h = h / (p.heads / p.kv_heads), head = b * p.heads + h;
      const MaskOfHead mask = mask_of(p.mask, b, h);
      for (int64_t m_first = mask_m; m_first < m_stop; m_first += T::kRows) {
        tiles.hold(matrix<S>(p.q, b, h, p.q_len), matrix<S>(p.grad, b, h, p.q_len), m_first);
        copy_async_commit();
        const int64_t m0 = m_first + warp * 16;
        const auto each = [&](int stage, int64_t n0, int piece) {
          if (T::kPieces == 1 || piece != 0) set_to_zero(s), set_to_zero(dp);
          tiles.multiply(s, 0, warp * 16, stage, piece);
          tiles.multiply(dp, 1, warp * 16, stage, piece);
          if (piece != 0) return;
          mask_scores<false, T::kColumns>(s[0], p, mask, m0, n0, inverse_scale);
#pragma unroll
          for (int j = 0; j < T::kColumns / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int64_t m = m0 + lane / 4 + i / 2 * 8;
              if (m >= p.q_len) continue;
              const float offset = offset_of(static_cast<const float*>(p.lse)[head * p.q_len + m]);
              const float e = exp2_approximate(s[0][j][i] * (scale * kLog2E) - offset);
              sum[j][i] += e * (dp[0][j][i] - p.delta[head * p.q_len + m]);
            }
        };
        for_tiles(tiles, matrix<S>(p.k, b, kv_h, p.k_len), matrix<S>(p.v, b, kv_h, p.k_len), mask_n, n_stop, 0, each);
      }
    }

  // The tile by way of shared memory, where rows and columns are added up in order.
  float* const table = reinterpret_cast<float*>(tiles.shared);
  constexpr int kTableRow = T::kColumns + 1;
  static_assert(T::kRows * kTableRow * sizeof(float) <= T::kSharedBytes, "the table fits");
  for (int j = 0; j < T::kColumns / 8; ++j)
    for (int i = 0; i < 4; ++i)
      table[(warp * 16 + lane / 4 + i / 2 * 8) * kTableRow + j * 8 + lane % 4 * 2 + i % 2] = sum[j][i];
  __syncthreads();
  const int rows = sums_queries ? 1 : T::kRows, columns = sums_keys ? 1 : T::kColumns;
  for (int i = threadIdx.x; i < rows * columns; i += T::kThreads) {
    const int row = i / columns, column = i % columns;
    if (mask_m + row >= size[2] || mask_n + column >= size[3]) continue;
    float x = 0.f;
    for (int r = row; r < (sums_queries ? T::kRows : row + 1); ++r)
      for (int c = column; c < (sums_keys ? T::kColumns : column + 1); ++c) x += table[r * kTableRow + c];
    store_mask_gradient(p, (mask_head * size[2] + mask_m + row) * size[3] + mask_n + column, x);
  }
}

template <class S, int kBucket>
cudaError_t run(const AttentionParams& p, cudaStream_t stream) {
  using T = Traits<S, kBucket>;
  const auto blocks = [](int64_t n) { return static_cast<unsigned>(n); };
  const bool read = rows_aligned<S>(p.q, p.head_dim) && rows_aligned<S>(p.k, p.head_dim) &&
                    rows_aligned<S>(p.v, p.head_dim) && rows_aligned<S>(p.grad, p.head_dim);
  const bool written =
      rows_aligned<S>(p.dq, p.head_dim) && rows_aligned<S>(p.dk, p.head_dim) && rows_aligned<S>(p.dv, p.head_dim);
  const bool aligned = read && written;
  cudaError_t error = launch(query_gradient_kernel<S, kBucket>,
                             dim3(blocks(ceil_div(p.q_len, T::kRows) * p.batch * p.heads), T::kPieces), T::kThreads,
                             T::kSharedBytes, stream, p, aligned);
  if (error != cudaSuccess) return error;
  error = launch(key_gradient_kernel<S, kBucket>,
                 dim3(blocks(ceil_div(p.k_len, T::kRows) * p.batch * p.kv_heads), T::kWide ? 2 * T::kPieces : 1),
                 T::kThreads, T::kSharedBytes, stream, p, aligned);
  if (error != cudaSuccess || !p.dmask) return error;
  const int64_t* const size = p.mask_size;
  const int64_t mask_tiles = ceil_div(size[2], T::kRows) * ceil_div(size[3], T::kColumns) * size[0] * size[1];
  return launch(mask_gradient_kernel<S, kBucket>, blocks(mask_tiles), T::kThreads, T::kSharedBytes, stream, p, read);
}

}  // namespace

// On sm_90, too. Predicted, not measured, on an H200 in bf16 for (2, 24, 1024, 1024, 128): seven products, of which
// mma.sync makes half as many a cycle as wgmma, take 191 us against 95; five, with dq summed by atomics beside dk and
// dv, 68, but then no two runs have the same bits. wgmma wants p and ds in shared memory besides, and beside what is
// held there is no room for them and two stages above D = 64.
cudaError_t attention_backward_kernel(const AttentionParams& p, cudaStream_t stream) {
  return dispatch_element(p.dtype, [&]<class S>() {
    return dispatch_head_dim(p.head_dim, [&]<int kBucket>() { return run<S, kBucket>(p, stream); });
  });
}

}  // namespace imagegen::cuda
