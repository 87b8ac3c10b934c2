// A tile in the registers of a block, or of a cluster of blocks: one read, one write.
#include "group_norm_silu/cuda_regimes.h"

#include "group_norm_silu/cuda_tile.cuh"

namespace dd::cuda {
namespace {

// Blocks to a multiprocessor that the registers are planned for: 128 registers each, or 80.
DD_HOST_DEVICE constexpr int blocks_for(Access access, int held) {
    return access == Access::channels_last || held >= 8 ? 2 : 3;
}

// Every block of the cluster reads the others' shares of the statistics.
template <class Place>
DD_DEVICE void share_statistics(const Place& place, const NormForward& a, const NormShared& shared) {
    const int blocks = a.plan.cluster;
    if (blocks > 1)
        cluster_sync();
    else
        __syncthreads();
    for (int group = threadIdx.x; group < a.plan.tile_groups; group += kNormThreads) {
        auto load = [&](int part, float& mean, float& m2) {
            mean = blocks > 1 ? load_from_rank(&shared.group_mean[group], part) : shared.group_mean[group];
            m2 = blocks > 1 ? load_from_rank(&shared.group_m2[group], part) : shared.group_m2[group];
        };
        combine_parts(place, blocks, a.options.eps, load, shared.mean[group], shared.rstd[group]);
        if (blocks == 1 || cluster_rank() == 0) {
            const int64_t at = place.group_in_tensor(group);
            a.mean[at] = shared.mean[group];
            a.rstd[at] = shared.rstd[group];
        }
    }
    // No block may end while another reads its memory.
    if (blocks > 1)
        cluster_sync();
    else
        __syncthreads();
}

template <DType dtype, Access access, int K, bool of_two>
__global__ void __launch_bounds__(kNormThreads, blocks_for(access, K)) held_kernel(const NormForward a) {
    const unsigned cluster = static_cast<unsigned>(a.plan.cluster);
    const Place<dtype, access> place(a.shape, a.plan, blockIdx.x / cluster, static_cast<int>(blockIdx.x % cluster));
    const NormShared shared(place);
    const Held<Place<dtype, access>, K> held(place, a, place.first_row(), std::bool_constant<of_two>{});
    if (of_two && a.sum) held.store(place, a.sum);
    reduce_block(place, held.moments(place, a.options.pre_shift), shared);
    share_statistics(place, a, shared);
    Affine affines[place.kLength];
    if (place.kSameChannels) load_affines(place, a.options, shared, place.first_row(), affines);
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const auto row = held.row(place, i);
        if (!place.has(row)) continue;
        if (!place.kSameChannels) load_affines(place, a.options, shared, row, affines);
        finish_row<dtype>(place, a, row, held.packs[i], affines);
    }
}

using Kernel = void (*)(NormForward);

template <DType dtype, Access access>
Kernel kernel_holding(int held, bool of_two) {
    constexpr int most = most_held(dtype, access, Direction::forward);
    if (of_two) return held <= 4 ? &held_kernel<dtype, access, 4, true> : &held_kernel<dtype, access, most, true>;
    switch (held) {
        case 2:
            return &held_kernel<dtype, access, 2, false>;
        case 4:
            return &held_kernel<dtype, access, 4, false>;
        case 8:
            return &held_kernel<dtype, access, 8, false>;
        default:
            return &held_kernel<dtype, access, most, false>;
    }
}

Kernel kernel_for(const NormForward& a, const NormPlan& plan) {
    return for_dtype(a.shape.dtype, [&](auto dtype) {
        return plan.access == Access::contiguous
                   ? kernel_holding<dtype.value, Access::contiguous>(plan.held, a.of_two())
                   : kernel_holding<dtype.value, Access::channels_last>(plan.held, a.of_two());
    });
}

}  // namespace

int held_largest_cluster(const NormForward& a, const NormPlan& plan) {
    return largest_cluster(reinterpret_cast<const void*>(kernel_for(a, plan)), kNormThreads);
}

void group_norm_silu_held(const NormForward& a, cudaStream_t stream) {
    Grid grid{a.plan.tiles * a.plan.cluster, 1, kNormThreads, NormShared::bytes(a.shape, a.plan), a.plan.cluster};
    launch("group_norm_silu", kernel_for(a, a.plan), grid, stream, a);
}

}  // namespace dd::cuda
