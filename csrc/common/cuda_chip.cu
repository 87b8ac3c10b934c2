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
constexpr size_t kMostSharedBytes = 48 << 10;  // of a block that has not asked for more

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

int current_device() {
    int device = 0;
    check(cudaGetDevice(&device));
    return device;
}

// Whether the kernel that runs here was compiled for clusters: one for an older chip, which the driver has compiled
// again from its PTX, has no instruction to reach another block.
bool knows_clusters(const void* kernel) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 10 * kFirstWithClusters;
}

// Whether any cluster of this size finds its multiprocessors: parts of a chip (MIG) may be too small for it.
bool runs_in(int cluster, const void* kernel, int threads) {
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
    (void)cudaGetLastError();  // or the next launch would report it
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
    if (is_new && !knows_clusters(kernel)) cluster = 1;
    while (is_new && cluster > 1 && !runs_in(cluster, kernel, threads)) cluster /= 2;
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
