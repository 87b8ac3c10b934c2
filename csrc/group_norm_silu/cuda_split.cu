// Forward for tiles split over blocks: one pass for the statistics, a second for the output.
#include "group_norm_silu/cuda_split.cuh"

#include "group_norm_silu/cuda_regimes.h"
#include "group_norm_silu/cuda_statistics.cuh"

namespace dd::cuda {
namespace {

constexpr int kAtOnce = 4;  // vectors that a thread loads before it uses one

// The address of a block's moments of a group, in [N G][splits][2]: mean and sum of squares.
template <class Position>
DD_DEVICE float* partial_moments(const Position& position, const NormForward& a, int group, int part) {
    return a.partials + 2 * (position.group_in_tensor(group) * a.plan.splits + part);
}

template <DType dtype, Access access>
__global__ void __launch_bounds__(kNormThreads, 3) statistics_kernel(const NormForward a) {
    const auto position = split_position<dtype, access>(a);
    const NormShared shared(position);
    Moments<position.kLength> moments;
    for (auto row = position.first_row(); position.has(row); row += kAtOnce * position.step) {
        Resident<Position<dtype, access>, kAtOnce> resident(position, a.x, a.skip, row);
        if (a.residual) resident.add(position, a.residual, a.sum);
        moments.merge(resident.moments(position, a.options.pre_shift));
    }
    reduce_block(position, moments, shared, [&](int group, float mean, float m2) {
        float* partial = partial_moments(position, a, group, static_cast<int>(blockIdx.x % a.plan.splits));
        partial[0] = mean;
        partial[1] = m2;
    });
}

template <DType dtype, Access access, bool rare>
__global__ void __launch_bounds__(kNormThreads, 2) apply_kernel(const NormForward a) {
    const auto position = split_position<dtype, access>(a);
    const NormShared shared(position);
    auto load = [&](int group, int part, float& mean, float& m2) {
        const float* partial = partial_moments(position, a, group, part);
        mean = partial[0];
        m2 = partial[1];
    };
    combine_parts(position, a.plan.splits, a.eps, load, [&](int group, float mean, float rstd) {
        shared.mean[group] = mean;
        shared.rstd[group] = rstd;
        if (blockIdx.x % a.plan.splits != 0) return;
        const int64_t at = position.group_in_tensor(group);
        a.mean[at] = mean;
        a.rstd[at] = rstd;
    });
    __syncthreads();
    Affine affines[position.kLength];
    if (position.kSameChannels && position.active)
        load_affines(position, a.options, shared, position.first_row(), affines);
    for (auto first = position.first_row(); position.has(first); first += kAtOnce * position.step) {
        const Resident<Position<dtype, access>, kAtOnce, true> resident(position, a.x, a.skip, first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const auto row = resident.row(position, i);
            if (!position.has(row)) continue;
            if (!position.kSameChannels) load_affines(position, a.options, shared, row, affines);
            finish_row<dtype, rare, true>(position, a, row, resident.packs[i], affines);
        }
    }
}

// Returns the arguments of the second pass, which reads x + residual where the first has written it.
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
        for_activation(a.options.activation, [&](auto rare) {
            launch("group_norm_silu", apply_kernel<dtype, access, rare.value>, grid, stream, second_pass(a));
        });
    });
}

}  // namespace dd::cuda
