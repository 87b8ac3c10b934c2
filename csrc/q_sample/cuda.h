#pragma once

#include <cuda_runtime.h>

#include "q_sample/arguments.h"

namespace dd::cuda {

void q_sample(const QSampleArguments& arguments, cudaStream_t stream);

}  // namespace dd::cuda
