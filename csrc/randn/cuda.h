#pragma once

#include <cuda_runtime.h>

#include "common/layout.h"

namespace dd::cuda {

struct RandnArguments {
    Layout layout;
    Operand z;
    const int64_t* key;  // (seed, first_sample, draw), on the device
    uint32_t stream;
};

void randn(const RandnArguments& arguments, cudaStream_t stream);

}  // namespace dd::cuda
