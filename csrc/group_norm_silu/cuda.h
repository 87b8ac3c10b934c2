#pragma once

#include <cuda_runtime.h>

#include "common/layout.h"
#include "group_norm_silu/arguments.h"
#include "group_norm_silu/cuda_plan.h"

namespace dd::cuda {

constexpr int kActivations = 5;  // checked in cuda_activation.cuh

using group_norm::Options;

struct NormForward {
    NormShape shape;
    NormPlan plan;
    Options options;
    float eps;
    const void* x;
    const void* residual;  // added to x, which gives sum; or null
    const void* skip;      // the channels after x's; or null
    void *sum, *y;
    float *mean, *rstd;  // [N, G]
    float* partials;     // forward_partials() floats
    int64_t first_tile;  // of the wave that a launch works on
};

// Floats of workspace in which the blocks of a split tile leave their partial statistics.
inline int64_t forward_partials(const NormShape& shape, const NormPlan& plan) {
    return plan.regime == Regime::split ? 2 * shape.samples * shape.groups * plan.splits : 0;
}

// Plans the kernels for the current device.
NormPlan plan_forward(const NormShape& shape);

void group_norm_silu(const NormForward& arguments, cudaStream_t stream);

}  // namespace dd::cuda
