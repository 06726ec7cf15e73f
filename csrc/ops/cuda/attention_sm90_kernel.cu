// attention's forward on the tensor cores of sm_90a (wgmma), in 16 bits. A block takes 64 queries of one head a
// warpgroup, which keeps the scores, the running softmax and the output of its own in registers. Queries, keys and
// values lie in shared memory as wgmma reads them, keys and values in two stages. A warpgroup multiplies the values of
// one tile and the keys of the next while it takes the softmax of that next: tensor cores and exponentials are busy
// together.
//
// Predicted, not measured: cycles of an SM for 128 queries times 128 keys, where tensor cores make 2048 products a
// cycle (mma.sync: 1024), and 16 exponentials are taken and 128 bytes of shared memory moved in one:
//                     tensor cores   exponentials   shared memory
//   D = 128 wgmma     2048           1024           1792: 768 for q and k, 512 for v, 512 to fill
//           mma.sync  4096           1024           3584: each warp reads k and v, and q with every tile
//   D = 64  wgmma     1024           1024           1024
//           mma.sync  2048           1024           1536
// Twice the speed, then, and at worst 1.2 times the products where a head dim is rounded up to its bucket (but below
// 48, where exponentials are the limit for both). So this kernel takes all that it can: 16-bit types, rows at multiples
// of 16 bytes, and head dims up to 160, above which its registers do not suffice.
#include "attention_tile.cuh"
#include "common/wgmma.cuh"

namespace imagegen::cuda {
namespace {

constexpr int kAtom = 64;  // elements in the 128 bytes along which rows are swizzled

template <int kBucketOfD>
struct Traits {
  static constexpr int kBucket = kBucketOfD;
  // Three warpgroups read keys and values less often; they leave 168 registers a thread, enough up to a bucket of 80.
  static constexpr int kWarpgroups = kBucket <= 80 ? 3 : 2;
  static constexpr int kThreads = 128 * kWarpgroups, kQueries = 64 * kWarpgroups;
  // 80: the 77 keys of a text are one tile. Larger tiles read the queries less often.
  static constexpr int kKeys = kBucket == 128 ? 128 : 80;
  static constexpr int kWidth = (kBucket + kAtom - 1) / kAtom * kAtom;
  static constexpr int kTile = kKeys * kWidth;
  static constexpr int kSharedBytes = (kQueries * kWidth + 4 * kTile) * 2;
  static_assert(kBucket % 16 == 0 && kKeys % 16 == 0, "whole products");
  static_assert(kKeys * kAtom * 2 % 1024 == 0, "every tile begins where the swizzle does");
  static_assert(kQueries * kRowOf<bf16, kBucket> * 2 <= kSharedBytes, "the output passes through there");
  static_assert(kSharedBytes <= 227 * 1024, "what sm_90 gives a block");
};

// Brings kRows rows to a tile, asynchronously: kAtom columns after another, each with all rows, swizzled for wgmma.
// Zeros for rows from `valid` on and columns from head_dim on.
template <class T, int kRows, class S>
__device__ __forceinline__ void fill_swizzled(S* tile, const S* from, int64_t stride, int valid, int head_dim) {
  constexpr int kStep = T::kThreads / 8;
  const int piece = threadIdx.x % 8, first = threadIdx.x / 8;
  S* const to = tile + first * kAtom + (piece ^ first % 8) * 8;
  const S* source = from + first * stride + piece * 8;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep, source += kStep * stride) {
    if (first + r >= kRows) continue;
#pragma unroll
    for (int d = 0; d < T::kBucket; d += kAtom) {
      if (d + piece * 8 >= T::kBucket) continue;
      const bool inside = first + r < valid && d + piece * 8 < head_dim;
      copy_async(to + d * kRows + r * kAtom, inside ? source + d : from, inside);
    }
  }
}

// Rows first to first + 63 of a tile of kRows rows, or its rows as columns: 16 of its columns from d on are the depth.
template <int kRows>
__device__ __forceinline__ SharedOperand rows_at(SharedOperand tile, int d) {
  return tile.plus(d / kAtom * kRows * 128 + d % kAtom * 2);
}

template <int kFirst, int kCount, int kTiles>
__device__ __forceinline__ float (&part_of(float (&c)[kTiles][4])) [kCount] {
  static_assert(kFirst % 4 == 0 && kFirst + kCount <= 4 * kTiles);
  return reinterpret_cast<float (&)[kCount]>(c[kFirst / 4]);
}

// s = q k^T, going on.
template <class T, class S>
__device__ __forceinline__ void multiply_keys(float (&s)[T::kKeys / 8][4], SharedOperand q, SharedOperand k) {
#pragma unroll
  for (int d = 0; d < T::kBucket; d += 16)
    wgmma<Major::depth>(part_of<0, T::kKeys / 2>(s), rows_at<T::kQueries>(q, d), rows_at<T::kKeys>(k, d), d > 0, S{});
}

// out += weights v, going on; columns from kColumn on. Powers of two, so that none but the last begins inside an atom.
template <class T, class S, int kColumn = 0>
__device__ __forceinline__ void multiply_values(float (&out)[T::kBucket / 8][4],
                                                const uint32_t (&weights)[T::kKeys / 16][4], SharedOperand v) {
  constexpr int kRest = T::kBucket - kColumn;
  constexpr int kColumns = kRest >= 128 ? 128 : kRest >= 64 ? 64 : kRest >= 32 ? 32 : 16;
  static_assert(kColumn % kAtom == 0);
#pragma unroll
  for (int k = 0; k < T::kKeys; k += 16)
    wgmma<Major::columns>(part_of<kColumn / 2, kColumns / 2>(out), weights[k / 16],
                          v.plus(kColumn * T::kKeys * 2 + k * 128), true, S{});
  if constexpr (kRest > kColumns) multiply_values<T, S, kColumn + kColumns>(out, weights, v);
}

template <class S, int kBucket>
__global__ void __launch_bounds__((Traits<kBucket>::kThreads), 1)
    forward_sm90_kernel(const __grid_constant__ AttentionParams p) {
#ifdef IMAGEGEN_HAS_WGMMA
  using T = Traits<kBucket>;
  S* const q_tile = dynamic_shared<S>();
  S* const k_tiles = q_tile + T::kQueries * T::kWidth;
  S* const v_tiles = k_tiles + 2 * T::kTile;

  // Positions take 32 bits, addresses 64.
  const int q_len = static_cast<int>(p.q_len), k_len = static_cast<int>(p.k_len),
            head_dim = static_cast<int>(p.head_dim);
  const int q_tiles = (q_len + T::kQueries - 1) / T::kQueries, heads = static_cast<int>(p.heads);
  const int head = static_cast<int>(blockIdx.x) / q_tiles, b = head / heads, h = head % heads;
  const int kv_h = h / (heads / static_cast<int>(p.kv_heads));
  // Under a causal mask the last tiles are the longest: they start first.
  const int m0 = (q_tiles - 1 - static_cast<int>(blockIdx.x) % q_tiles) * T::kQueries;
  const S* const k = static_cast<const S*>(p.k.p) + b * p.k.batch_stride + kv_h * p.k.head_stride;
  const S* const v = static_cast<const S*>(p.v.p) + b * p.v.batch_stride + kv_h * p.v.head_stride;
  const MaskOfHead mask = mask_of(p.mask, b, h);
  const int diagonal = k_len - q_len;
  const int stop = p.causal ? min(k_len, m0 + T::kQueries + diagonal) : k_len;

  const auto fill = [&](S* tiles, const S* from, int64_t stride, int n0, int stage) {
    fill_swizzled<T, T::kKeys>(tiles + stage * T::kTile, from + n0 * stride, stride, k_len - n0, head_dim);
  };
  const auto fill_keys = [&](int n0, int stage) { fill(k_tiles, k, p.k.row_stride, n0, stage); };
  const auto fill_values = [&](int n0, int stage) { fill(v_tiles, v, p.v.row_stride, n0, stage); };
  const auto wait_for_copies = [] {
    copy_async_wait<0>();
    async_proxy_fence();
    __syncthreads();
  };

  const int row0 = threadIdx.x / 32 * 16;  // this warp's first
  const SharedOperand q_rows = shared_operand(q_tile + row0 / 64 * 64 * kAtom, Swizzle::bytes128, 16, 1024);
  const SharedOperand keys = shared_operand(k_tiles, Swizzle::bytes128, 16, 1024);
  const SharedOperand values = shared_operand(v_tiles, Swizzle::bytes128, T::kKeys * 128, 1024);
  const float scale = static_cast<float>(p.scale), inverse_scale = static_cast<float>(1 / p.scale);
  float out[kBucket / 8][4] = {}, s[T::kKeys / 8][4];
  uint32_t weights[T::kKeys / 16][4];
  RunningSoftmax softmax;

  const auto hold_all = [&] {
    wgmma_hold(part_of<0, kBucket / 2>(out));
    wgmma_hold(part_of<0, T::kKeys / 2>(s));
#pragma unroll
    for (int i = 0; i < T::kKeys / 16; ++i) wgmma_hold(weights[i]);
  };
  // Turns the scores of keys n0 on into weights that are not yet rounded.
  const auto soften = [&](int n0, float (&shrink)[2]) {
    const bool whole = n0 + T::kKeys <= k_len && (!p.causal || n0 + T::kKeys - 1 <= m0 + row0 + diagonal);
    if (!whole || mask.kind != AttentionMaskKind::none)
      mask_scores<false, T::kKeys>(s, p, mask, m0 + row0, n0, inverse_scale);
    softmax.take(s, scale * kLog2E, shrink);
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < T::kKeys / 16; ++i) {
      const typename Product<S>::A a = Product<S>::accumulators(s + 2 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[i][j] = a.r[j];
    }
  };

  if (stop > 0) {
    const S* const q = static_cast<const S*>(p.q.p) + b * p.q.batch_stride + h * p.q.head_stride;
    fill_swizzled<T, T::kQueries>(q_tile, q + m0 * p.q.row_stride, p.q.row_stride, q_len - m0, head_dim);
    fill_keys(0, 0);
    copy_async_commit();
    wait_for_copies();
    fill_values(0, 0);
    if (T::kKeys < stop) fill_keys(T::kKeys, 1);
    copy_async_commit();

    wgmma_fence();
    multiply_keys<T, S>(s, q_rows, keys);
    wgmma_commit();
    wgmma_wait<0>();
    hold_all();
    float shrink[2];
    soften(0, shrink);
    round_weights();
    int stage = 0;
    for (int n0 = T::kKeys; n0 < stop; n0 += T::kKeys, stage ^= 1) {
      wait_for_copies();  // the values of the tile before and the keys of this; everyone is done with the other stages
      fill_values(n0, stage ^ 1);
      if (n0 + T::kKeys < stop) fill_keys(n0 + T::kKeys, stage);
      copy_async_commit();

      hold_all();
      wgmma_fence();
      multiply_keys<T, S>(s, q_rows, keys.plus((stage ^ 1) * T::kTile * 2));
      wgmma_commit();
      multiply_values<T, S>(out, weights, values.plus(stage * T::kTile * 2));
      wgmma_commit();
      wgmma_wait<1>();
      wgmma_hold(part_of<0, T::kKeys / 2>(s));
      soften(n0, shrink);
      wgmma_wait<0>();
      hold_all();
      multiply_rows(out, shrink);
      round_weights();
    }
    wait_for_copies();
    hold_all();
    wgmma_fence();
    multiply_values<T, S>(out, weights, values.plus(stage * T::kTile * 2));
    wgmma_commit();
    wgmma_wait<0>();
    hold_all();
    __syncthreads();  // the output passes through memory that others multiply
  }

  constexpr int kRow = kRowOf<S, kBucket>;
  const int m = m0 + row0, valid = min(q_len - m, 16);
  float factor[2];
  softmax.finish(static_cast<float*>(p.lse) + head * p.q_len + m, valid, scale, factor);
  S* const to = static_cast<S*>(p.out.p) + b * p.out.batch_stride + h * p.out.head_stride + m * p.out.row_stride;
  store_rows<kBucket>(q_tile + row0 * kRow, to, p.out.row_stride, valid, RowsShape{head_dim, kBucket, true}, out,
                      factor[0], factor[1]);
#endif
}

template <class S, int kBucket>
cudaError_t run(const AttentionParams& p, cudaStream_t stream) {
  using T = Traits<kBucket>;
  const int64_t blocks = (p.q_len + T::kQueries - 1) / T::kQueries * p.batch * p.heads;
  return launch(forward_sm90_kernel<S, kBucket>, dim3(static_cast<unsigned>(blocks)), T::kThreads, T::kSharedBytes,
                stream, p);
}

template <class S, int kBucket, int... kLarger>
cudaError_t run_bucket(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (sizeof...(kLarger) > 0)
    if (p.head_dim > kBucket) return run_bucket<S, kLarger...>(p, stream);
  return run<S, kBucket>(p, stream);
}

}  // namespace

bool attention_sm90_takes(const AttentionParams& p) {
  return p.dtype != Dtype::f32 && p.head_dim <= 160 && max(p.q_len, p.k_len) < (1 << 30) &&
         forward_rows_aligned<bf16>(p);
}

cudaError_t attention_sm90_kernel(const AttentionParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::bf16) return run_bucket<bf16, 64, 80, 96, 128, 160>(p, stream);
  return run_bucket<fp16, 64, 80, 96, 128, 160>(p, stream);
}

}  // namespace imagegen::cuda
