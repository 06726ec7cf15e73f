// The weights of two blocks that multiply neighbouring tiles by the same ones: each brings half of them from L2, into
// the shared memory of both.
#pragma once
#include "common/cluster.cuh"
#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

constexpr int kBlocksOfCluster = 2;

// kProducts products for each chunk, kAhead chunks on their way. A stage is filled again once all warps of both blocks
// have multiplied by what it holds: a warp of the other block says so one chunk later, in release(); those of this one
// have by then met at a barrier. So neither block waits for the other unless that is more than a chunk behind.
template <class S, int kThreads, int kChannels, int kProducts>
struct ClusterWeights {
  static constexpr int kStages = 5, kAhead = 3;
  static constexpr int kProduct = kChannels * kStep<S>, kStage = kProducts * kProduct;
  static constexpr int kHalf = kStage / kBlocksOfCluster;
  static constexpr int kBytes = kStages * (kStage * static_cast<int>(sizeof(S)) + 2 * int{sizeof(CopyBarrier)});
  const int rank = cluster_rank();
  S* const stages;             // of shared memory
  CopyBarrier* const arrived;  // of each stage
  CopyBarrier* const read;     // by the other block
  const S* const from;         // this block's half of the first chunk

  __device__ __forceinline__ ClusterWeights(S* shared, const UpsampleConv2dParams& p, int64_t n0)
      : stages(shared),
        arrived(reinterpret_cast<CopyBarrier*>(stages + kStages * kStage)),
        read(arrived + kStages),
        from(static_cast<const S*>(p.weight) +
             n0 / kChannels * weight_steps(int64_t{p.x.channels} * sizeof(S)) * 9 * kProduct + rank * kHalf) {
    if (threadIdx.x != 0) return;
    for (int s = 0; s < kStages; ++s) arrived[s].init(), read[s].init(kThreads / 32);
  }
  // By one thread, for one chunk after another: its products from number `first` on.
  __device__ __forceinline__ void load(int chunk, int first) const {
    const int s = chunk % kStages;
    if (chunk >= kStages) read[s].wait((chunk / kStages - 1) % 2);
    arrived[s].expect(kStage * static_cast<int>(sizeof(S)));
    copy_to_cluster(stages + s * kStage + rank * kHalf, from + int64_t{first} * kProduct,
                    kHalf * static_cast<int>(sizeof(S)), arrived[s], (1 << kBlocksOfCluster) - 1);
  }
  // By all that multiply: the chunk's weights.
  __device__ __forceinline__ const S* wait(int chunk) const {
    arrived[chunk % kStages].wait(chunk / kStages % 2);
    return stages + chunk % kStages * kStage;
  }
  // By all that multiply, once those products are done.
  __device__ __forceinline__ void release(int chunk) const {
    if (threadIdx.x % 32 == 0) read[chunk % kStages].arrive_at(rank ^ 1);
  }
};

}  // namespace
}  // namespace imagegen::cuda
