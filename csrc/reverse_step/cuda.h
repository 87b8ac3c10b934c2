#pragma once

#include <cuda_runtime.h>

#include "common/layout.h"

namespace dd::cuda {

struct ReverseStepArguments {
    Layout layout;
    Operand x, out, variance, uncond, noise;
    float guidance_scale;
    const float* threshold;  // [N], or null
    const float* rows;       // [row_count, 10]
    int64_t row_count;
    const int64_t* timesteps;
    const int64_t* step;  // [1] or [N]
    int64_t step_stride;
    const int64_t* key;  // (seed, first_sample, draw), or null
    Operand x_prev, x0;
};

void reverse_step(const ReverseStepArguments& arguments, cudaStream_t stream);

}  // namespace dd::cuda
