#pragma once

#include <cuda_runtime.h>

#include "common/layout.h"
#include "group_norm_silu/cuda_plan.h"

namespace dd::cuda {

// What forward and backward are told beside their tensors: [C] or [N, C], null where absent.
struct NormOptions {
    const float *weight, *bias, *pre_shift, *scale, *shift;
    float eps;
    bool silu;
};

struct NormForward {
    NormShape shape;
    NormPlan plan;
    NormOptions options;
    const void* x;
    const void* residual;  // added to x, which gives sum; or null
    const void* skip;      // holds the channels after x's; or null
    void *sum, *y;
    float *mean, *rstd;  // [N, G]
    float* partials;     // as many as forward_partials() says
    int64_t first_tile;  // of a wave
};

// Floats that the blocks of a split tile leave for one another.
inline int64_t forward_partials(const NormShape& shape, const NormPlan& plan) {
    return plan.regime == Regime::split ? 2 * shape.samples * shape.groups * plan.splits : 0;
}

// For the current device.
NormPlan plan_forward(const NormShape& shape);

void group_norm_silu(const NormForward& arguments, cudaStream_t stream);

}  // namespace dd::cuda
