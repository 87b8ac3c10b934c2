#pragma once

#include <cuda_runtime.h>

#include "common/layout.h"

namespace dd::cuda {

struct QSampleArguments {
    Layout layout;
    Operand x_start, noise;
    const float* rows;  // [row_count, 2]
    int64_t row_count;
    const int64_t* t;  // [1] or [N]
    int64_t t_stride;
    const int64_t* key;  // (seed, first_sample, draw), or null where noise is given
    Operand x_t, noise_out;
};

void q_sample(const QSampleArguments& arguments, cudaStream_t stream);

}  // namespace dd::cuda
