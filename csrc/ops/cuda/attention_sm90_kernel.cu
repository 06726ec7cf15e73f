// attention's forward on the tensor cores of sm_90a (wgmma), in 16 bits. A block takes 64 queries of one head a
// warpgroup, which keeps the scores, the running softmax and the output of its own in registers. The copy engine (TMA)
// brings queries, keys and values into shared memory as wgmma reads them, keys and values in two stages; a warpgroup
// multiplies the values of one tile and the keys of the next while it takes the softmax of that next: tensor cores and
// exponentials are busy together.
//
// The engine cuts boxes out of strided tensors of four axes and fills up with zeros, so views of a fused projection,
// 77 keys and head dims between the buckets cost no thread a comparison. Copies without its descriptor cannot swizzle
// rows as wgmma reads them.
//
// Predicted, not measured: cycles of an SM for 128 queries times 128 keys, where tensor cores make 2048 products a
// cycle (mma.sync: 1024), and 16 exponentials are taken and 128 bytes of shared memory moved in one:
//                     tensor cores   exponentials   shared memory
//   D = 128 wgmma     2048           1024           1792: 768 for q and k, 512 for v, 512 to fill
//           mma.sync  4096           1024           3584: each warp reads k and v, and q with every tile
//   D = 64  wgmma     1024           1024           1024
//           mma.sync  2048           1024           1536
// and microseconds on an H200 (132 SMs, 1.75 GHz, 4.3 TB/s), where 2048 products a cycle for D itself are the floor and
// "here" is the largest column, for whole waves of blocks:
//   (B, H, Lq, Lk, D)          floor  here  tensor cores  exponentials  shared memory  memory
//   (1, 8, 4096, 4096, 40)     23     38    38            38            36             2
//   (1, 10, 4096, 4096, 64)    45     57    57            57            50             5
//   (1, 16, 1024, 1024, 72)    5      7     6             5             7              2
//   (2, 8, 1024, 1024, 80)     6      7     6             5             7              2
//   (2, 24, 1024, 1024, 128)   27     28    28            14            25             12
//   (1, 8, 256, 256, 160)      0.4    4     4             2             4              1
//   (1, 8, 4096, 77, 40)       0.4    1     1             1             1              1
//   (2, 8, 1024, 77, 80)       0.4    1     1             1             1              1
// Twice the speed of mma.sync, then, and at worst 1.3 times the products where a head dim is rounded up to its bucket
// (but below 48, where exponentials are the limit for both). So this kernel takes all that it can: 16-bit types, rows
// and strides that the engine takes, and head dims up to 256. Above, 64 queries times 512 sums are 256 registers a
// thread and two stages of keys and values 320 KB: attention_kernel.cu has them in two pieces.
#include "attention_tile.cuh"
#include "common/copy_tensor.cuh"
#include "common/wgmma.cuh"

namespace imagegen::cuda {
namespace {

constexpr int kAtom = kBoxColumns;  // elements in the 128 bytes along which rows are swizzled

// Queries, keys and values as the copy engine knows them.
struct Maps {
  TensorMap q, k, v;
};

template <int kBucketOfD, int kWarpgroupsOfBlock>
struct Traits {
  static constexpr int kBucket = kBucketOfD, kWarpgroups = kWarpgroupsOfBlock;
  static constexpr int kThreads = 128 * kWarpgroups, kQueries = 64 * kWarpgroups;
  // 80: the 77 keys of a text are one tile. Larger tiles read the queries less often.
  static constexpr int kKeys = kBucket == 128 ? 128 : 80;
  static constexpr int kWidth = (kBucket + kAtom - 1) / kAtom * kAtom;
  static constexpr int kTile = kKeys * kWidth;
  static constexpr int kQueryBytes = kQueries * kWidth * 2, kTileBytes = kTile * 2;
  static constexpr int kSharedBytes = kQueryBytes + 4 * kTileBytes + 2 * static_cast<int>(sizeof(CopyBarrier));
  static_assert(kBucket % 16 == 0 && kKeys % 16 == 0, "whole products");
  static_assert(kKeys * kAtom * 2 % 1024 == 0, "every tile begins where the swizzle does");
  static_assert(kQueries * kRowOf<bf16, kBucket> * 2 <= kSharedBytes, "the output passes through there");
  static_assert(kSharedBytes <= 227 * 1024, "what sm_90 gives a block");
};

// Asks for kRows rows of a head, from `row` on: kAtom columns after another, each with all rows, swizzled for wgmma.
// Zeros where the tensor has none.
template <class T, int kRows, class S>
__device__ __forceinline__ void ask_for_rows(S* tile, const TensorMap& map, int row, int h, int b,
                                             CopyBarrier& arrived) {
#pragma unroll
  for (int d = 0; d < T::kBucket; d += kAtom) copy_tensor(tile + d * kRows, map, d, row, h, b, arrived);
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

template <class S, class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    forward_sm90_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Maps maps) {
#ifdef IMAGEGEN_HAS_WGMMA
  constexpr int kBucket = T::kBucket;
  S* const q_tile = dynamic_shared<S>();
  S* const k_tiles = q_tile + T::kQueries * T::kWidth;
  S* const v_tiles = k_tiles + 2 * T::kTile;
  CopyBarrier* const arrived = reinterpret_cast<CopyBarrier*>(v_tiles + 2 * T::kTile);

  // Positions take 32 bits, addresses 64.
  const int q_len = static_cast<int>(p.q_len), k_len = static_cast<int>(p.k_len),
            head_dim = static_cast<int>(p.head_dim);
  const int q_tiles = (q_len + T::kQueries - 1) / T::kQueries, heads = static_cast<int>(p.heads);
  const int head = static_cast<int>(blockIdx.x) / q_tiles, b = head / heads, h = head % heads;
  const int kv_h = h / (heads / static_cast<int>(p.kv_heads));
  // Under a causal mask the last tiles are the longest: they start first.
  const int m0 = (q_tiles - 1 - static_cast<int>(blockIdx.x) % q_tiles) * T::kQueries;
  const MaskOfHead mask = mask_of(p.mask, b, h);
  const int diagonal = k_len - q_len;
  const int stop = p.causal ? min(k_len, m0 + T::kQueries + diagonal) : k_len;
  const int tiles = stop > 0 ? (stop + T::kKeys - 1) / T::kKeys : 0;

  // Asks for the keys of a tile and the values of the one before it, where they exist; with the first for the queries.
  const auto ask_for = [&](int tile) {
    if (threadIdx.x != 0) return;
    CopyBarrier& all = arrived[tile % 2];
    all.expect((tile == 0 ? T::kQueryBytes : T::kTileBytes) + (tile < tiles ? T::kTileBytes : 0));
    if (tile == 0)
      ask_for_rows<T, T::kQueries>(q_tile, maps.q, m0, h, b, all);
    else
      ask_for_rows<T, T::kKeys>(v_tiles + (tile - 1) % 2 * T::kTile, maps.v, (tile - 1) * T::kKeys, kv_h, b, all);
    if (tile < tiles) ask_for_rows<T, T::kKeys>(k_tiles + tile % 2 * T::kTile, maps.k, tile * T::kKeys, kv_h, b, all);
  };
  const auto wait_for = [&](int tile) { arrived[tile % 2].wait(tile / 2 % 2); };

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

  if (tiles > 0) {
    if (threadIdx.x == 0) arrived[0].init(), arrived[1].init();
    __syncthreads();
    ask_for(0);
    ask_for(1);

    wait_for(0);
    wgmma_fence();
    multiply_keys<T, S>(s, q_rows, keys);
    wgmma_commit();
    wgmma_wait<0>();
    hold_all();
    float shrink[2];
    soften(0, shrink);
    round_weights();
    for (int tile = 1; tile < tiles; ++tile) {
      __syncthreads();  // everyone is done with the keys of the tile before and the values of the one before that
      ask_for(tile + 1);
      wait_for(tile);

      hold_all();
      wgmma_fence();
      multiply_keys<T, S>(s, q_rows, keys.plus(tile % 2 * T::kTileBytes));
      wgmma_commit();
      multiply_values<T, S>(out, weights, values.plus((tile - 1) % 2 * T::kTileBytes));
      wgmma_commit();
      wgmma_wait<1>();
      wgmma_hold(part_of<0, T::kKeys / 2>(s));
      soften(tile * T::kKeys, shrink);
      wgmma_wait<0>();
      hold_all();
      multiply_rows(out, shrink);
      round_weights();
    }
    wait_for(tiles);
    hold_all();
    wgmma_fence();
    multiply_values<T, S>(out, weights, values.plus((tiles - 1) % 2 * T::kTileBytes));
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

cudaError_t make_map(TensorMap& map, const AttentionParams& p, const AttentionInput& t, int64_t heads, int64_t length,
                     int rows) {
  return make_tensor_map(map, t.p, {p.head_dim, length, heads, p.batch},
                         {t.row_stride * 2, t.head_stride * 2, t.batch_stride * 2}, rows);
}

template <class T>
int64_t blocks_of(const AttentionParams& p) {
  return (p.q_len + T::kQueries - 1) / T::kQueries * p.batch * p.heads;
}

template <class S, class T>
cudaError_t run(const AttentionParams& p, cudaStream_t stream) {
  Maps maps{};
  if (p.k_len > 0)  // else nothing is copied, and there is nothing to describe
    for (const cudaError_t error : {make_map(maps.q, p, p.q, p.heads, p.q_len, T::kQueries),
                                    make_map(maps.k, p, p.k, p.kv_heads, p.k_len, T::kKeys),
                                    make_map(maps.v, p, p.v, p.kv_heads, p.k_len, T::kKeys)})
      if (error != cudaSuccess) return error;
  return launch(forward_sm90_kernel<S, T>, dim3(static_cast<unsigned>(blocks_of<T>(p))), T::kThreads, T::kSharedBytes,
                stream, p, maps);
}

// Three warpgroups read keys and values less often than two; they leave 168 registers a thread, enough up to a bucket
// of 80. Two, one block of which a multiprocessor takes as well, run where their waves of blocks end sooner.
template <class S, int kBucket>
cudaError_t run(const AttentionParams& p, cudaStream_t stream) {
  using Two = Traits<kBucket, 2>;
  if constexpr (kBucket <= 80) {
    using Three = Traits<kBucket, 3>;
    const auto waves = [&](int64_t blocks) { return (blocks + p.multiprocessors - 1) / p.multiprocessors; };
    if (3 * waves(blocks_of<Three>(p)) <= 2 * waves(blocks_of<Two>(p))) return run<S, Three>(p, stream);
  }
  return run<S, Two>(p, stream);
}

template <class S, int kBucket, int... kLarger>
cudaError_t run_bucket(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (sizeof...(kLarger) > 0)
    if (p.head_dim > kBucket) return run_bucket<S, kLarger...>(p, stream);
  return run<S, kBucket>(p, stream);
}

// Whether the copy engine can step along an axis: not where it is expanded from one element.
bool steps(int64_t size, int64_t stride) {
  return size <= 1 || (0 < stride && stride < int64_t{1} << 39);
}
bool steps(const AttentionParams& p, const AttentionInput& t, int64_t heads, int64_t length) {
  return steps(length, t.row_stride) && steps(heads, t.head_stride) && steps(p.batch, t.batch_stride);
}

}  // namespace

bool attention_sm90_takes(const AttentionParams& p) {
  return p.dtype != Dtype::f32 && p.head_dim <= 256 && max(p.q_len, p.k_len) < (1 << 30) &&
         forward_rows_aligned<bf16>(p) && steps(p, p.q, p.heads, p.q_len) && steps(p, p.k, p.kv_heads, p.k_len) &&
         steps(p, p.v, p.kv_heads, p.k_len);
}

cudaError_t attention_sm90_kernel(const AttentionParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::bf16) return run_bucket<bf16, 64, 80, 96, 128, 160, 256>(p, stream);
  return run_bucket<fp16, 64, 80, 96, 128, 160, 256>(p, stream);
}

}  // namespace imagegen::cuda
