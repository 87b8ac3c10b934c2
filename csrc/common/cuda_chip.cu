#include "common/cuda_chip.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace dd::cuda {
namespace {

constexpr int kFirstWithClusters = 9;          // compute capability
constexpr size_t kMostSharedBytes = 48 << 10;  // per block, without opting in to more

void check(cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("dd_kernels: a query of the CUDA device failed: ") +
                                 cudaGetErrorString(error));
    }
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device));
    return value;
}

int current_device() {
    int device = 0;
    check(cudaGetDevice(&device));
    return device;
}

// Returns whether the kernel was compiled for an architecture with clusters. The driver compiles the PTX of an older
// one for this chip too, but that code has no instruction to reach another block's shared memory.
bool has_cluster_code(const void* kernel) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 10 * kFirstWithClusters;
}

// Returns whether a cluster of this size can be resident at all: a part of a chip (MIG) may have too few
// multiprocessors.
bool can_be_resident(int cluster, const void* kernel, int threads) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = kMostSharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters > 0;
    (void)cudaGetLastError();  // clears the error, which the next launch would report
    return false;
}

}  // namespace

int largest_cluster(const void* kernel, int threads) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, int> found;
    const int most = current_chip().max_cluster;
    std::lock_guard<std::mutex> lock(mutex);
    auto [entry, is_new] = found.emplace(std::make_pair(current_device(), kernel), most);
    int& cluster = entry->second;
    if (is_new && !has_cluster_code(kernel)) cluster = 1;
    while (is_new && cluster > 1 && !can_be_resident(cluster, kernel, threads)) cluster /= 2;
    return cluster;
}

const Chip& current_chip() {
    static std::mutex mutex;
    static std::map<int, Chip> chips;
    const int device = current_device();
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
