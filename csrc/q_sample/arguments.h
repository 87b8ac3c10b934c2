// What a call of q_sample carries, on the CPU and on CUDA.
#pragma once

#include "common/layout.h"

namespace dd {

struct QSampleArguments {
    Layout layout;
    Operand x_start, noise;  // without noise, it is drawn from the key
    const float* rows;       // [row_count, 2]
    int64_t row_count;
    SampleIndex t;
    const int64_t* key;  // [3], see load_key(); null where noise is given
    Operand x_t, noise_out;
};

}  // namespace dd
