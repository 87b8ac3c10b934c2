// In place of csrc/common/cuda_torch.h: the ops take CPU tensors, under a name of their own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace dd::cuda {

struct OnDevice {
    explicit OnDevice(const torch::stable::Tensor&) {}

    cudaStream_t stream = nullptr;
};

}  // namespace dd::cuda

#define DD_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dd_kernels_host, CPU, m)
