// The weights of two blocks that multiply neighbouring tiles by the same ones: each brings half of them from L2, into
// the shared memory of both.
#pragma once
#include "common/cluster.cuh"
#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

constexpr int kBlocksOfCluster = 2;

// kProducts products for each chunk, kAhead chunks on their way. A stage is filled again once all warps of both blocks
// have multiplied by what it holds: those of the other block say so a chunk later, by release(); those of this one have
// by then met at a barrier. So neither block waits for the other unless that is more than a chunk behind.
template <class S, int kThreads, int kChannels, int kProducts>
struct ClusterWeights {
  static constexpr int kStages = 5, kAhead = 3;
  static constexpr int kProduct = kChannels * kStep<S>, kStage = kProducts * kProduct;
  // A block brings half of the products, or, where they are odd in number and lie beside each other, half of the bytes.
  static constexpr bool kJoined = kProducts % 2 != 0;
  static constexpr int kPieces = kJoined ? 1 : kProducts / 2, kPiece = kStage / 2 / kPieces;
  static constexpr int kStageBytes = kStage * static_cast<int>(sizeof(S));
  static constexpr int kBytes = kStages * (kStageBytes + 2 * static_cast<int>(sizeof(CopyBarrier)));
  const int rank = cluster_rank();
  S* const stages;             // of shared memory
  CopyBarrier* const arrived;  // of each stage
  CopyBarrier* const read;     // by the other block
  const int product;           // from one to the next where they come from
  const S* const from;         // this block's half of the first chunk

  __device__ __forceinline__ ClusterWeights(S* shared, const UpsampleConv2dParams& p, int64_t n0)
      : stages(shared),
        arrived(reinterpret_cast<CopyBarrier*>(stages + kStages * kStage)),
        read(arrived + kStages),
        product(kJoined ? kProduct : p.weight_block * kStep<S>),
        from(static_cast<const S*>(p.weight) +
             n0 / p.weight_block * weight_steps(int64_t{p.x.channels} * sizeof(S)) * 9 * product +
             n0 % p.weight_block * kStep<S> + rank * (kJoined ? kPiece : kPieces * product)) {
    if (threadIdx.x != 0) return;
    for (int s = 0; s < kStages; ++s) arrived[s].init(), read[s].init(kThreads / 32);
  }
  // By all, for one chunk after another: its products from number `first` on. Each warp asks for pieces of them.
  __device__ __forceinline__ void load(int chunk, int first) const {
    const int warp = threadIdx.x / 32, s = chunk % kStages;
    if (threadIdx.x % 32 != 0 || warp >= kPieces) return;
    if (chunk >= kStages) read[s].wait((chunk / kStages - 1) % 2);
    if (warp == 0) arrived[s].expect(kStageBytes);
    S* const to = stages + s * kStage + rank * kPieces * kPiece;
    const S* const begin = from + int64_t{first} * product;
#pragma unroll
    for (int i = 0; i < kPieces; i += kThreads / 32)
      if (i + warp < kPieces)
        copy_to_cluster(to + (i + warp) * kPiece, begin + (i + warp) * product, kPiece * static_cast<int>(sizeof(S)),
                        arrived[s], (1 << kBlocksOfCluster) - 1);
  }
  // By all that multiply: the chunk's weights. The shuffle tells the compiler that a warp has one stage, which spares
  // the nine products a fifth of their instructions: addresses that each lane might have another of.
  __device__ __forceinline__ const S* wait(int chunk) const {
    arrived[chunk % kStages].wait(chunk / kStages % 2);
    return stages + __shfl_sync(~0u, chunk % kStages, 0) * kStage;
  }
  // By all that multiply, once those products are done.
  __device__ __forceinline__ void release(int chunk) const {
    if (threadIdx.x % 32 == 0) read[chunk % kStages].arrive_at(rank ^ 1);
  }
};

// The blocks of a kernel whose traits are T, in whole clusters.
template <class T>
dim3 cluster_grid_of(const UpsampleConv2dParams& p) {
  dim3 grid = grid_of<T>(p);
  grid.x += grid.x % kBlocksOfCluster;
  return grid;
}

}  // namespace
}  // namespace imagegen::cuda
