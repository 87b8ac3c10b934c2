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
            const int64_t at = place.sample * a.shape.groups + place.first_channel / a.plan.group_channels + group;
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

template <DType dtype, Access access, int K>
__global__ void __launch_bounds__(kNormThreads, blocks_for(access, K)) held_kernel(const NormForward a) {
    const unsigned cluster = static_cast<unsigned>(a.plan.cluster);
    const Place<dtype, access> place(a.shape, a.plan, blockIdx.x / cluster, static_cast<int>(blockIdx.x % cluster));
    const NormShared shared(place);
    const Held<Place<dtype, access>, K> held(place, a.x, place.first_row());
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

template <DType dtype, Access access>
auto kernel_holding(int held) {
    constexpr int most = most_held(dtype, access, Direction::forward);
    switch (held) {
        case 2:
            return &held_kernel<dtype, access, 2>;
        case 4:
            return &held_kernel<dtype, access, 4>;
        case 8:
            return &held_kernel<dtype, access, 8>;
        default:
            return &held_kernel<dtype, access, most>;
    }
}

template <DType dtype>
auto kernel_for(const NormPlan& plan) {
    return plan.access == Access::contiguous ? kernel_holding<dtype, Access::contiguous>(plan.held)
                                             : kernel_holding<dtype, Access::channels_last>(plan.held);
}

}  // namespace

void group_norm_silu_held(const NormForward& a, cudaStream_t stream) {
    auto kernel = a.shape.dtype == DType::float32    ? kernel_for<DType::float32>(a.plan)
                  : a.shape.dtype == DType::bfloat16 ? kernel_for<DType::bfloat16>(a.plan)
                                                     : kernel_for<DType::float16>(a.plan);
    Grid grid{a.plan.tiles * a.plan.cluster, 1, kNormThreads, NormShared::bytes(a.shape, a.plan), a.plan.cluster};
    launch("group_norm_silu", kernel, grid, stream, a);
}

}  // namespace dd::cuda
