// What a plan needs to know of the GPU.
#pragma once

#include <cstdint>

namespace dd::cuda {

constexpr int kPortableCluster = 8;  // blocks that every chip with clusters lets share their memory

struct Chip {
    int sm_count, max_cluster;  // max_cluster: blocks that can share their memory; 1 before Hopper
    int64_t l2_bytes;
};

// The current device; asked once.
const Chip& current_chip();

// The largest cluster that a kernel with blocks of so many threads runs in on the current device, whatever
// shared memory it is launched with; asked once for every kernel.
int largest_cluster(const void* kernel, int threads);

}  // namespace dd::cuda
