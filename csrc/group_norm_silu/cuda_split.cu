// A tile split over blocks: one pass for its statistics, a second for its output, which for as many tiles
// as fit the L2 cache follows at once and reads from there.
#include "group_norm_silu/cuda_regimes.h"
#include "group_norm_silu/cuda_tile.cuh"

namespace dd::cuda {
namespace {

constexpr int kAtOnce = 4;  // vectors that a thread has under way

// Where a block leaves its share of a group: [N G][splits], a mean and a sum of squares each.
template <class Place>
DD_DEVICE float* partial(const Place& place, const NormForward& a, int group, int part) {
    const int64_t first_group = place.sample * a.shape.groups + place.first_channel / a.plan.group_channels;
    return a.partials + 2 * ((first_group + group) * a.plan.splits + part);
}

template <DType dtype, Access access>
DD_DEVICE Place<dtype, access> split_place(const NormForward& a) {
    const unsigned splits = static_cast<unsigned>(a.plan.splits);
    return {a.shape, a.plan, static_cast<unsigned>(a.first_tile) + blockIdx.x / splits,
            static_cast<int>(blockIdx.x % splits)};
}

template <DType dtype, Access access>
__global__ void __launch_bounds__(kNormThreads, 3) statistics_kernel(const NormForward a) {
    const auto place = split_place<dtype, access>(a);
    const NormShared shared(place);
    Moments<place.kLength> moments;
    for (auto row = place.first_row(); place.has(row); row += kAtOnce * place.step) {
        const Held<Place<dtype, access>, kAtOnce> held(place, a.x, row);
        moments.merge(held.moments(place, a.options.pre_shift));
    }
    reduce_block(place, moments, shared);
    __syncthreads();
    for (int group = threadIdx.x; group < a.plan.tile_groups; group += kNormThreads) {
        float* share = partial(place, a, group, static_cast<int>(blockIdx.x % a.plan.splits));
        share[0] = shared.group_mean[group];
        share[1] = shared.group_m2[group];
    }
}

template <DType dtype, Access access>
__global__ void __launch_bounds__(kNormThreads, 2) apply_kernel(const NormForward a) {
    const auto place = split_place<dtype, access>(a);
    const NormShared shared(place);
    for (int group = threadIdx.x; group < a.plan.tile_groups; group += kNormThreads) {
        auto load = [&](int part, float& mean, float& m2) {
            const float* share = partial(place, a, group, part);
            mean = share[0];
            m2 = share[1];
        };
        combine_parts(place, a.plan.splits, a.options.eps, load, shared.mean[group], shared.rstd[group]);
        if (blockIdx.x % a.plan.splits == 0) {
            const int64_t at = place.sample * a.shape.groups + place.first_channel / a.plan.group_channels + group;
            a.mean[at] = shared.mean[group];
            a.rstd[at] = shared.rstd[group];
        }
    }
    __syncthreads();
    Affine affines[place.kLength];
    if (place.kSameChannels && place.active) load_affines(place, a.options, shared, place.first_row(), affines);
    for (auto first = place.first_row(); place.has(first); first += kAtOnce * place.step) {
        const Held<Place<dtype, access>, kAtOnce, true> held(place, a.x, first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const auto row = held.row(place, i);
            if (!place.has(row)) continue;
            if (!place.kSameChannels) load_affines(place, a.options, shared, row, affines);
            finish_row<dtype>(place, a, row, held.packs[i], affines);
        }
    }
}

template <DType dtype, Access access>
void run_waves(NormForward a, cudaStream_t stream) {
    for (a.first_tile = 0; a.first_tile < a.plan.tiles; a.first_tile += a.plan.wave_tiles) {
        const int64_t tiles = std::min(a.plan.wave_tiles, a.plan.tiles - a.first_tile);
        const Grid grid{tiles * a.plan.splits, 1, kNormThreads, NormShared::bytes(a.shape, a.plan)};
        launch("group_norm_silu", statistics_kernel<dtype, access>, grid, stream, a);
        launch("group_norm_silu", apply_kernel<dtype, access>, grid, stream, a);
    }
}

template <DType dtype>
void run_as(const NormForward& a, cudaStream_t stream) {
    switch (a.plan.access) {
        case Access::contiguous:
            return run_waves<dtype, Access::contiguous>(a, stream);
        case Access::channels_last:
            return run_waves<dtype, Access::channels_last>(a, stream);
        case Access::scalar:
            return run_waves<dtype, Access::scalar>(a, stream);
    }
}

}  // namespace

void group_norm_silu_split(const NormForward& a, cudaStream_t stream) {
    switch (a.shape.dtype) {
        case DType::float32:
            return run_as<DType::float32>(a, stream);
        case DType::bfloat16:
            return run_as<DType::bfloat16>(a, stream);
        case DType::float16:
            return run_as<DType::float16>(a, stream);
    }
}

}  // namespace dd::cuda
