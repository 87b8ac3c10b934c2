// Launches a kernel that takes one struct of arguments.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/layout.h"

namespace dd::cuda {

struct Grid {
    int64_t blocks = 0, rows = 1;  // x and y
    int threads = 0;
    int64_t shared_bytes = 0;
    int cluster = 1;  // blocks that can read each other's shared memory
};

constexpr int64_t kMaxGridBlocks = 0x7fffffff, kMaxGridRows = 65535;

// Throws std::runtime_error with the kernel's name if the launch fails. Does nothing for an empty grid.
template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), const Grid& grid, cudaStream_t stream,
            const Arguments& arguments) {
    if (grid.blocks == 0 || grid.rows == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.rows));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    if (grid.cluster > 1) {
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    const bool fits = grid.blocks <= kMaxGridBlocks && grid.rows <= kMaxGridRows;
    cudaError_t error = fits ? cudaLaunchKernelEx(&config, kernel, arguments) : cudaErrorInvalidValue;
    if (error != cudaSuccess) {
        throw std::runtime_error("dd_kernels: the CUDA kernel of " + std::string(name) +
                                 " cannot be launched: " + cudaGetErrorString(error));
    }
}

// Calls start(std::integral_constant<DType, dtype>), which makes the dtype a template argument.
template <class Start>
auto for_dtype(DType dtype, const Start& start) {
    switch (dtype) {
        case DType::float32:
            return start(std::integral_constant<DType, DType::float32>{});
        case DType::bfloat16:
            return start(std::integral_constant<DType, DType::bfloat16>{});
        case DType::float16:
            break;
    }
    return start(std::integral_constant<DType, DType::float16>{});
}

}  // namespace dd::cuda
