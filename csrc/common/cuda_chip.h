// What a plan needs to know of the GPU.
#pragma once

#include <cstdint>

namespace dd::cuda {

struct Chip {
    int sm_count, max_cluster;  // max_cluster: blocks that can share their memory; 1 before Hopper
    int64_t l2_bytes;
};

// The current device; asked once.
const Chip& current_chip();

}  // namespace dd::cuda
