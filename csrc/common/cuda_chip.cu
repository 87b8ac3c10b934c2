#include "common/cuda_chip.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace dd::cuda {
namespace {

constexpr int kPortableCluster = 8, kFirstWithClusters = 9;

void check(cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("dd_kernels: the CUDA device cannot be asked: ") +
                                 cudaGetErrorString(error));
    }
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device));
    return value;
}

}  // namespace

const Chip& current_chip() {
    static std::mutex mutex;
    static std::map<int, Chip> chips;
    int device = 0;
    check(cudaGetDevice(&device));
    std::lock_guard<std::mutex> lock(mutex);
    auto found = chips.find(device);
    if (found == chips.end()) {
        bool clusters = attribute(cudaDevAttrComputeCapabilityMajor, device) >= kFirstWithClusters;
        Chip chip{attribute(cudaDevAttrMultiProcessorCount, device), clusters ? kPortableCluster : 1,
                  attribute(cudaDevAttrL2CacheSize, device)};
        found = chips.emplace(device, chip).first;
    }
    return found->second;
}

}  // namespace dd::cuda
