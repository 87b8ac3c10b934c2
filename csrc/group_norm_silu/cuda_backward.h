#pragma once

#include <cuda_runtime.h>

#include "group_norm_silu/cuda.h"

namespace dd::cuda {

struct NormBackward {
    NormShape shape;
    NormPlan plan;
    Options options;
    const void *dy, *x;
    const void *skip, *dsum;   // the channels after x's, and a gradient that is added to dx; or null
    const float *mean, *rstd;  // [N, G]
    void *dx, *dskip;
    float *dweight, *dbias, *dpre_shift, *dscale, *dshift;  // null where not wanted
    float* sums;                                            // [N C][sum_parts][3], of a split tile's channels
    float* per_sample;   // [2][N][C], what every sample adds to dweight and dbias; null if neither is asked for
    int sum_parts;       // blocks that the sums over a channel are split over
    int64_t first_tile;  // of the wave that a launch works on
};

NormPlan plan_backward(const NormShape& shape);

// Blocks that sum over the pixels of one channel of a split tile.
inline int backward_sum_parts(const NormShape& shape, const NormPlan& plan) {
    constexpr int64_t bytes_per_block = 64 << 10, most_parts = 64;
    if (plan.access == Access::channels_last) return plan.splits;
    const int64_t parts = ceil_div(shape.pixels * shape.element_bytes(), bytes_per_block);
    return static_cast<int>(std::min(parts, most_parts));
}

// Floats of per_sample and of sums.
inline int64_t per_sample_floats(const NormShape& shape) { return 2 * shape.samples * shape.channels; }
inline int64_t sum_floats(const NormShape& shape, const NormPlan& plan) {
    if (plan.regime != Regime::split) return 0;
    return 3 * shape.samples * shape.channels * backward_sum_parts(shape, plan);
}

void group_norm_silu_backward(const NormBackward& arguments, cudaStream_t stream);

// The regimes that it chooses from, and the largest cluster that the kernel of a register-resident plan runs in here.
int resident_backward_largest_cluster(const NormShape& shape, const NormPlan& plan);
void group_norm_silu_backward_resident(const NormBackward& arguments, cudaStream_t stream);
void group_norm_silu_backward_split(const NormBackward& arguments, cudaStream_t stream);

}  // namespace dd::cuda
