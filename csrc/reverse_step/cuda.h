#pragma once

#include <cuda_runtime.h>

#include "reverse_step/arguments.h"

namespace dd::cuda {

void reverse_step(const ReverseStepArguments& arguments, cudaStream_t stream);

}  // namespace dd::cuda
