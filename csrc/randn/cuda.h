#pragma once

#include <cuda_runtime.h>

#include "randn/arguments.h"

namespace dd::cuda {

void randn(const RandnArguments& arguments, cudaStream_t stream);

}  // namespace dd::cuda
