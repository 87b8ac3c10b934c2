// A tile in the registers of a block, or of a cluster of blocks: one read, one write.
#include "group_norm_silu/cuda_regimes.h"

#include "group_norm_silu/cuda_tile.cuh"

namespace dd::cuda {
namespace {

// Blocks to a multiprocessor that the registers are planned for: 64 registers a thread, 80 or 128. The less a thread
// holds, the more of them it takes to keep memory busy.
DD_HOST_DEVICE constexpr int blocks_for(Access access, int held) {
    return access == Access::channels_last ? 2 : held == 2 ? 4 : held == 4 ? 3 : 2;
}

// The statistics of the tile's groups, in shared memory and in the tensors. Every block of a cluster reads the
// others' shares.
template <class Place>
DD_DEVICE void share_statistics(const Place& place, const NormForward& a, const Moments<Place::kLength>& moments,
                                const NormShared& shared) {
    const int blocks = a.plan.cluster;
    const bool writes = blockIdx.x % static_cast<unsigned>(blocks) == 0;
    auto keep = [&](int group, float mean, float rstd) {
        shared.mean[group] = mean;
        shared.rstd[group] = rstd;
        if (!writes) return;
        const int64_t at = place.group_in_tensor(group);
        a.mean[at] = mean;
        a.rstd[at] = rstd;
    };
    reduce_block(place, moments, shared, [&](int group, float mean, float m2) {
        if (blocks == 1) return keep(group, mean, rstd_of(place, m2, a.options.eps));
        shared.group_mean[group] = mean;
        shared.group_m2[group] = m2;
    });
    if (blocks > 1) {
        cluster_sync();
        auto load = [&](int group, int part, float& mean, float& m2) {
            mean = load_from_rank(&shared.group_mean[group], part);
            m2 = load_from_rank(&shared.group_m2[group], part);
        };
        combine_parts(place, blocks, a.options.eps, load, keep);
        cluster_arrive();  // no block may end while another reads its memory
    }
    __syncthreads();
}

template <DType dtype, Access access, int K>
__global__ void __launch_bounds__(kNormThreads, blocks_for(access, K)) held_kernel(const NormForward a) {
    const unsigned cluster = static_cast<unsigned>(a.plan.cluster);
    const Place<dtype, access> place(a.shape, a.plan, blockIdx.x / cluster, static_cast<int>(blockIdx.x % cluster));
    const NormShared shared(place);
    Held<Place<dtype, access>, K> held(place, a.x, a.skip, place.first_row());
    if (a.residual) held.add(place, a.residual, a.sum);
    share_statistics(place, a, held.moments(place, a.options.pre_shift), shared);
    Affine affines[place.kLength];
    if (place.kSameChannels) load_affines(place, a.options, shared, place.first_row(), affines);
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const auto row = held.row(place, i);
        if (!place.has(row)) continue;
        if (!place.kSameChannels) load_affines(place, a.options, shared, row, affines);
        finish_row<dtype>(place, a, row, held.packs[i], affines);
    }
    if (cluster > 1) cluster_wait();
}

using Kernel = void (*)(NormForward);

template <DType dtype, Access access>
Kernel kernel_holding(int held) {
    constexpr int most = most_held(dtype, access, Direction::forward);
    return held == 2   ? &held_kernel<dtype, access, 2>
           : held == 4 ? &held_kernel<dtype, access, 4>
                       : &held_kernel<dtype, access, most>;
}

Kernel kernel_for(const NormShape& shape, const NormPlan& plan) {
    return for_dtype(shape.dtype, [&](auto dtype) {
        return plan.access == Access::contiguous ? kernel_holding<dtype.value, Access::contiguous>(plan.held)
                                                 : kernel_holding<dtype.value, Access::channels_last>(plan.held);
    });
}

}  // namespace

int held_largest_cluster(const NormShape& shape, const NormPlan& plan) {
    return largest_cluster(reinterpret_cast<const void*>(kernel_for(shape, plan)), kNormThreads);
}

void group_norm_silu_held(const NormForward& a, cudaStream_t stream) {
    Grid grid{a.plan.tiles * a.plan.cluster, 1, kNormThreads, NormShared::bytes(a.shape, a.plan), a.plan.cluster};
    launch("group_norm_silu", kernel_for(a.shape, a.plan), grid, stream, a);
}

}  // namespace dd::cuda
