// Forward, register-resident: a tile in the registers of a block, or of a cluster of blocks. One read, one write.
#include "group_norm_silu/cuda_resident.cuh"

#include "group_norm_silu/cuda_regimes.h"
#include "group_norm_silu/cuda_statistics.cuh"

namespace dd::cuda {
namespace {

// Blocks per multiprocessor that the registers allow: 64 registers per thread, 80 or 128. The fewer vectors a thread
// holds, the more threads keep memory busy.
DD_HOST_DEVICE constexpr int blocks_for(Access access, int resident) {
    return access == Access::channels_last ? 2 : resident == 2 ? 4 : resident == 4 ? 3 : 2;
}

// Puts the statistics of the tile's groups into shared memory and the tensors. Every block of a cluster reads the other
// blocks' moments.
template <class Position>
DD_DEVICE void combine_statistics(const Position& position, const NormForward& a,
                                  const Moments<Position::kLength>& moments, const NormShared& shared) {
    const int blocks = a.plan.cluster;
    const bool writes = blockIdx.x % static_cast<unsigned>(blocks) == 0;
    auto keep = [&](int group, float mean, float rstd) {
        shared.mean[group] = mean;
        shared.rstd[group] = rstd;
        if (!writes) return;
        const int64_t at = position.group_in_tensor(group);
        a.mean[at] = mean;
        a.rstd[at] = rstd;
    };
    reduce_block(position, moments, shared, [&](int group, float mean, float m2) {
        if (blocks == 1) return keep(group, mean, rstd_of(position, m2, a.eps));
        shared.group_mean[group] = mean;
        shared.group_m2[group] = m2;
    });
    if (blocks > 1) {
        cluster_sync();
        auto load = [&](int group, int part, float& mean, float& m2) {
            mean = load_from_rank(&shared.group_mean[group], part);
            m2 = load_from_rank(&shared.group_m2[group], part);
        };
        combine_parts(position, blocks, a.eps, load, keep);
        cluster_arrive();  // no block may end while another reads its memory
    }
    __syncthreads();
}

template <DType dtype, Access access, int K, bool rare>
__global__ void __launch_bounds__(kNormThreads, blocks_for(access, K)) resident_kernel(const NormForward a) {
    const auto position = resident_position<dtype, access>(a, blockIdx.x);
    const NormShared shared(position);
    Resident<Position<dtype, access>, K> resident(position, a.x, a.skip, position.first_row());
    if (a.residual) resident.add(position, a.residual, a.sum);
    combine_statistics(position, a, resident.moments(position, a.options.pre_shift), shared);
    Affine affines[position.kLength];
    if (position.kSameChannels) load_affines(position, a.options, shared, position.first_row(), affines);
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const auto row = resident.row(position, i);
        if (!position.has(row)) continue;
        if (!position.kSameChannels) load_affines(position, a.options, shared, row, affines);
        finish_row<dtype, rare>(position, a, row, resident.packs[i], affines);
    }
    if (a.plan.cluster > 1) cluster_wait();
}

struct ForwardKernels {
    static constexpr const char* kName = "group_norm_silu";

    static int64_t shared_bytes(const NormShape& shape, const NormPlan& plan) { return NormShared::bytes(shape, plan); }

    template <DType dtype, Access access, bool rare>
    static auto holding(int resident) -> void (*)(NormForward) {
        constexpr int most = most_resident(dtype, access, Direction::forward);
        return resident == 2   ? &resident_kernel<dtype, access, 2, rare>
               : resident == 4 ? &resident_kernel<dtype, access, 4, rare>
                               : &resident_kernel<dtype, access, most, rare>;
    }
};

}  // namespace

int resident_largest_cluster(const NormShape& shape, const NormPlan& plan) {
    return largest_cluster_of<ForwardKernels>(shape, plan);
}

void group_norm_silu_resident(const NormForward& a, cudaStream_t stream) { launch_resident<ForwardKernels>(a, stream); }

}  // namespace dd::cuda
