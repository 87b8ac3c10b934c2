// What a call of reverse_step carries, on the CPU and on CUDA.
#pragma once

#include "common/layout.h"

namespace dd {

constexpr int64_t kStepColumns = 12;  // of StepRow in formula.h

// Where x0 of the last two steps of a sample lie. The older one's place takes this step's.
struct History {
    Operand last, older;
};

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
    Operand even, odd;  // x0 of the last even step and of the last odd one; without `odd`, x0 of the last step

    // Of a step; without `odd` both are one place, whose x0 is that of the last step.
    DD_HOST_DEVICE History history(int64_t step) const {
        if (!odd) return {even, even};
        return step % 2 == 0 ? History{odd, even} : History{even, odd};
    }
};

}  // namespace dd
