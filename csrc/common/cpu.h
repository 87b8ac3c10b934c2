// Runs an op's kernel on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "common/cpu_isa.h"
#include "common/tensors.h"

namespace dd {

// Throws unless every index is a row of a table of `rows`; on a GPU, where they are not read here, kernels write NaN.
inline void check_rows(const char* op, const char* name, const SampleIndex& index, int64_t samples, int64_t rows) {
    for (int64_t i = 0; i < (index.stride == 0 ? 1 : samples); ++i) {
        if (index[i] < 0 || index[i] >= rows) {
            refuse(op, name, "in [0, " + std::to_string(rows) + ")", std::to_string(index[i]));
        }
    }
}

// Calls kernel(arguments, first tile, last tile, scratch) for stretches of all tiles, on torch's threads; scratch holds
// `buffers` tiles of floats. A thread takes at least 32768 elements: waking it for fewer costs more than it gives.
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

// Returns the threads that so many multiply-adds are worth: below a million waking a second one costs more than it
// gives.
inline int64_t threads_for(double products) {
    return products < 1e6 ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

// Calls body(from, to) for parts of [0, count) on so many threads, torch's.
template <class Body>
void on_threads(int64_t count, int64_t threads, Body body) {
    if (threads == 1) return body(0, count);
    torch::stable::parallel_for(0, count, 1, body);
}

}  // namespace dd
