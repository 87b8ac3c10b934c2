// What a call of reverse_step carries, on the CPU and on CUDA.
#pragma once

#include "common/layout.h"

namespace dd {

constexpr int64_t kStepColumns = 10;  // of StepRow in formula.h

struct ReverseStepArguments {
    Layout layout;
    Operand x, out, variance, uncond, noise;
    float guidance_scale;
    const float* threshold;  // [N], of dynamic thresholding, or null
    const float* rows;       // [row_count, kStepColumns]
    int64_t row_count;
    const int64_t* timesteps;  // [row_count]
    SampleIndex step;
    const int64_t* key;  // [3], see load_key(); null where noise is given or none is drawn
    Operand x_prev, x0;
};

}  // namespace dd
