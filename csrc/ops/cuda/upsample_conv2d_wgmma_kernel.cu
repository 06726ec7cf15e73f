// upsample_conv2d's forward by warpgroups (wgmma, sm_90a): the nine products at once, for 32 channels of y.
//
// A warpgroup owns 8 x 8 pixels and 32 channels: nine sums of 64 x 32. Its pixels come from registers: a warp's 16 rows
// are two rows of eight pixels, so two loads of matrices bring them and the rows around them, and the nine operands are
// differences between those, with nothing written to shared memory. From there, a product of 64 x 32 would read 2 KB of
// pixels in the 16 cycles it takes, on top of 8 for the weights. A block's two warpgroups share the weights, and two
// blocks of neighbouring tiles bring them together.
#include "common/wgmma.cuh"
#include "upsample_conv2d_cluster.cuh"
#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

// Of the bytes that a block takes from L2, 576 of 936 for each channel of x would be weights. A cluster of two halves
// those, which leaves shared memory as what is slowest. Nobody issues more than 343 instructions a chunk, 97 of the
// first line's us. Predicted, not measured, in bf16 on H200:
//                       L2 to a block           all of it: L2           tensor cores   shared memory
//   (1, 512, 128, 128)  479 KB, shared 332      151 us, shared 104       98 us         129 us
//   (1, 512, 256, 256)  479            332      604            418      391            514
//   (1, 256, 512, 512)  240            166      604            418      391            514
//   (8, 320, 32, 32)    300            207       30             20       19             25
template <class S_>
struct Traits {
  using S = S_;
  static constexpr int kHeight = 16, kWidth = 8, kChannels = 32, kThreads = 256;
  static constexpr int kChunk = 2 * kStep<S>, kStages = 3;  // of the patch
  static constexpr int kPatchWidth = kWidth + 2, kPixels = (kHeight + 2) * kPatchWidth;
  using Patch = PatchCopies<S, kThreads, kPixels, kChunk / kPackSize<S>>;
  using Weights = ClusterWeights<S, kThreads, kChannels, 9 * (kChunk / kStep<S>)>;
  static constexpr int kSharedBytes = Weights::kBytes + kStages * Patch::kSize * static_cast<int>(sizeof(S));
  static constexpr int kTileBytes = kTileBytesWithMoments<kThreads, 2 * kHeight, 2 * kWidth, kChannels>;
  static_assert(sizeof(S) == 2 && kSharedBytes <= 227 * 1024, "what sm_90 gives a block");
  static_assert(Weights::kBytes % 16 == 0, "patches begin where 16-byte copies may");
  static_assert(kTileBytes <= Weights::kStageBytes * Weights::kStages, "results leave the barriers alone");
};

template <class T>
__global__ void __launch_bounds__(T::kThreads) forward_kernel(const __grid_constant__ UpsampleConv2dParams p) {
#ifdef IMAGEGEN_HAS_WGMMA
  using S = typename T::S;
  using Patch = typename T::Patch;
  using Operands = Operands<S, 1, Patch::kRow, T::kPatchWidth>;
  S* const shared = dynamic_shared<S>();
  S* const patches = shared + T::Weights::kBytes / sizeof(S);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp owns rows 2 warp and 2 warp + 1
  // The block that fills up the last cluster has no tile: it multiplies the last one's again and keeps nothing of it.
  const int64_t tiles = tiles_of<T>(p), last = min(int64_t{blockIdx.x}, tiles - 1);
  const ForwardTile<T> tile(p, last);
  const typename T::Weights weights(shared, p, tile.n0);
  cluster_arrive();
  const auto load = [&](int stage, int chunk) {
    tile.patch.issue(patches + stage * Patch::kSize, tile.x, chunk * T::kChunk, p.x.channels);
  };
  const auto load_weights = [&](int chunk) {
    if (chunk < tile.chunks) weights.load(chunk, chunk * 18);
  };

  float sum[9][T::kChannels / 2] = {};
  const auto landed = [] {};
  Chunks<T::kStages, T::kStages - 1, decltype(landed), decltype(load)> chunks(tile.chunks, landed, load);
  cluster_wait();
  for (int chunk = 0; chunk < T::Weights::kAhead; ++chunk) load_weights(chunk);
#pragma unroll 1
  for (int chunk = 0; chunk < tile.chunks; ++chunk) {
    const Operands operands(patches + chunks.next() * Patch::kSize + 2 * warp * T::kPatchWidth * Patch::kRow);
    const SharedOperand w = shared_operand(weights.wait(chunk), Swizzle::none, 128, 256);
#pragma unroll
    for (int step = 0; step < T::kChunk / kStep<S>; ++step) {
      const auto products = [&](int column, const typename Operands::Column& v) {
        Fragment a[3];
        Operands::by_rows(v, [&](int row, const Fragment(&operand)[1]) { a[row] = operand[0]; });
        wgmma_fence();
#pragma unroll
        for (int row = 0; row < 3; ++row) {
          const int number = 3 * column + row;
          wgmma<Major::depth>(sum[number], a[row].r, w.plus((step * 9 + number) * T::Weights::kProduct * 2), true, S{});
        }
        wgmma_commit();
        wgmma_wait<1>();  // the operands of the three before may be written over
      };
      const auto centre = operands.column(1, step);
      products(0, centre);
      products(1, Operands::difference(operands.column(0, step), centre));
      products(2, Operands::difference(operands.column(2, step), centre));
    }
    if (chunk > 0) weights.release(chunk - 1);  // between products a branch would have them wait for each other
    load_weights(chunk + T::Weights::kAhead);
  }
  wgmma_wait<0>();
  copy_async_wait<0>();
  cluster_arrive();  // nothing more goes to the other block, nor comes from it
  __syncthreads();

  constexpr int kRow = T::kChannels + 4;
  float* const results = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int e = 0; e < T::kChannels / 2; e += 2)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const auto result = [&](int at) {
          const auto of = [&](int number) { return sum[number][at]; };
          return of(0) + of(1 + r) + of(3 + 3 * c) + of(4 + 3 * c + r);
        };
        const int i = 2 * (2 * warp + e / 2 % 2) + r, j = 2 * (lane / 4) + c;
        float* const to = results + (i * 2 * T::kWidth + j) * kRow + e / 4 * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = {result(e), result(e + 1)};
      }
  __syncthreads();
  const TileOfOutput at{tile.b, 2 * tile.i0, 2 * tile.j0, tile.n0, 2 * p.height, 2 * p.width};
  if (blockIdx.x < tiles) {
    store_tile<T::kThreads, 2 * T::kHeight, 2 * T::kWidth, T::kChannels>(results, p, at, S{});
    if (p.moments) keep_moments<T::kThreads, 2 * T::kHeight, 2 * T::kWidth, T::kChannels>(results, p, at, S{});
  }
  cluster_wait();
#endif
}

template <class S>
cudaError_t run(const UpsampleConv2dParams& p, cudaStream_t stream) {
  using T = Traits<S>;
  const cudaError_t error = launch_clusters(kBlocksOfCluster, forward_kernel<T>, cluster_grid_of<T>(p), T::kThreads,
                                            T::kSharedBytes, stream, p);
  return then_moments<T>(error, p, stream);
}

}  // namespace

cudaError_t upsample_conv2d_wgmma_kernel(const UpsampleConv2dParams& p, cudaStream_t stream) {
  return p.dtype == Dtype::bf16 ? run<bf16>(p, stream) : run<fp16>(p, stream);
}

}  // namespace imagegen::cuda
