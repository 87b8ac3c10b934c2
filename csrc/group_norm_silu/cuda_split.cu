// A tile split over blocks: one pass for its statistics, a second for its output.
#include "group_norm_silu/cuda_split.cuh"

#include "group_norm_silu/cuda_regimes.h"
#include "group_norm_silu/cuda_tile.cuh"

namespace dd::cuda {
namespace {

constexpr int kAtOnce = 4;  // vectors that a thread has under way

// Where a block leaves its share of a group: [N G][splits], a mean and a sum of squares each.
template <class Place>
DD_DEVICE float* partial(const Place& place, const NormForward& a, int group, int part) {
    return a.partials + 2 * (place.group_in_tensor(group) * a.plan.splits + part);
}

template <DType dtype, Access access>
__global__ void __launch_bounds__(kNormThreads, 3) statistics_kernel(const NormForward a) {
    const auto place = split_place<dtype, access>(a);
    const NormShared shared(place);
    Moments<place.kLength> moments;
    for (auto row = place.first_row(); place.has(row); row += kAtOnce * place.step) {
        Held<Place<dtype, access>, kAtOnce> held(place, a.x, a.skip, row);
        if (a.residual) held.add(place, a.residual, a.sum);
        moments.merge(held.moments(place, a.options.pre_shift));
    }
    reduce_block(place, moments, shared, [&](int group, float mean, float m2) {
        float* share = partial(place, a, group, static_cast<int>(blockIdx.x % a.plan.splits));
        share[0] = mean;
        share[1] = m2;
    });
}

template <DType dtype, Access access>
__global__ void __launch_bounds__(kNormThreads, 2) apply_kernel(const NormForward a) {
    const auto place = split_place<dtype, access>(a);
    const NormShared shared(place);
    auto load = [&](int group, int part, float& mean, float& m2) {
        const float* share = partial(place, a, group, part);
        mean = share[0];
        m2 = share[1];
    };
    combine_parts(place, a.plan.splits, a.options.eps, load, [&](int group, float mean, float rstd) {
        shared.mean[group] = mean;
        shared.rstd[group] = rstd;
        if (blockIdx.x % a.plan.splits != 0) return;
        const int64_t at = place.group_in_tensor(group);
        a.mean[at] = mean;
        a.rstd[at] = rstd;
    });
    __syncthreads();
    Affine affines[place.kLength];
    if (place.kSameChannels && place.active) load_affines(place, a.options, shared, place.first_row(), affines);
    for (auto first = place.first_row(); place.has(first); first += kAtOnce * place.step) {
        const Held<Place<dtype, access>, kAtOnce, true> held(place, a.x, a.skip, first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const auto row = held.row(place, i);
            if (!place.has(row)) continue;
            if (!place.kSameChannels) load_affines(place, a.options, shared, row, affines);
            finish_row<dtype, true>(place, a, row, held.packs[i], affines);
        }
    }
}

// The second pass over x + residual reads the sum that the first has written.
NormForward second_pass(NormForward a) {
    if (a.residual) a.x = a.sum;
    return a;
}

}  // namespace

void group_norm_silu_split(const NormForward& arguments, cudaStream_t stream) {
    for_waves(arguments, arguments.plan.wave_tiles, [&](const auto& a, int64_t tiles, auto dtype_, auto access_) {
        constexpr DType dtype = dtype_.value;
        constexpr Access access = access_.value;
        const Grid grid{tiles * a.plan.splits, 1, kNormThreads, NormShared::bytes(a.shape, a.plan)};
        launch("group_norm_silu", statistics_kernel<dtype, access>, grid, stream, a);
        launch("group_norm_silu", apply_kernel<dtype, access>, grid, stream, second_pass(a));
    });
}

}  // namespace dd::cuda
