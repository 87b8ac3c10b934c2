// The CPU's ops: their noise key, and onto torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "common/cpu_isa.h"
#include "common/tensors.h"

namespace dd {

inline NoiseKey noise_key(const std::optional<Tensor>& key) {
    if (!key.has_value()) return {0, 0, 0};
    const int64_t* values = data<int64_t>(*key);
    return {values[0], values[1], values[2]};
}

// Runs kernel(arguments, first tile, last tile, scratch) over all tiles on torch's threads;
// scratch holds `buffers` tiles of floats. Below 32768 elements waking a thread costs more than it gives.
template <class Arguments>
void run_tiles(const Arguments& arguments, int buffers, void (*kernel)(const Arguments&, int64_t, int64_t, float*)) {
    constexpr int64_t elements_per_thread = 32768;
    int64_t tile = arguments.layout.tile_elements();
    int64_t grain = std::max<int64_t>(1, elements_per_thread / tile);
    torch::stable::parallel_for(0, arguments.layout.tiles(), grain, [&](int64_t first, int64_t last) {
        std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(buffers * tile)]);
        kernel(arguments, first, last, scratch.get());
    });
}

}  // namespace dd
