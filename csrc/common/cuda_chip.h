// The properties of the GPU that kernels are planned by.
#pragma once

#include <cstdint>

namespace dd::cuda {

constexpr int kPortableCluster = 8;  // the cluster size that every chip with clusters supports

struct Chip {
    int sm_count, max_cluster;  // max_cluster is 1 before Hopper
    int64_t l2_bytes;
};

// Returns the properties of the current device, which are queried once per device.
const Chip& current_chip();

// Returns the largest cluster size at which `kernel`, in blocks of `threads`, can be resident on the current device
// with 48 KiB of shared memory per block. Queried once per kernel and device.
int largest_cluster(const void* kernel, int threads);

}  // namespace dd::cuda
