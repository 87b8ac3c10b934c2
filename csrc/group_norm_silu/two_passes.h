// Runs a pass of two steps over each unit: sums over its tiles, then a map over its tiles that needs the sums. Forward
// and backward are such passes.
#pragma once

#include "common/cpu.h"
#include "group_norm_silu/binding.h"
#include "group_norm_silu/tiling.h"

namespace dd::group_norm {

// Holds the partial sums and the coefficients of some units; one allocation each, not initialised.
template <class Pass>
struct Workspace {
    using Partial = typename Pass::Partial;
    const Pass& pass;
    std::unique_ptr<Partial[]> partials;
    std::unique_ptr<float[]> coefficients;

    Workspace(const Pass& pass, int64_t units)
        : pass(pass),
          partials(new Partial[static_cast<size_t>(units * pass.partials())]),
          coefficients(new float[static_cast<size_t>(units * pass.coefficients())]) {}

    Partial* partial(int64_t slot) const { return partials.get() + slot * pass.partials(); }
    float* coefficient(int64_t slot) const { return coefficients.get() + slot * pass.coefficients(); }
};

// Finishes one unit before the next, so that the map finds in the cache what the sums have read.
template <class Pass>
void run_by_units(const Pass& pass, int64_t grain) {
    int64_t tiles = pass.tiling.tiles;
    torch::stable::parallel_for(0, pass.tiling.units(), grain, [&](int64_t first, int64_t last) {
        Workspace<Pass> work(pass, 1);
        std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(pass.scratch() + pass.saved())]);
        float* saved = pass.saved() == 0 ? nullptr : scratch.get() + pass.scratch();
        for (int64_t index = first; index < last; ++index) {
            Unit unit = pass.tiling.unit(index);
            pass.prepare(unit, work.coefficient(0));
            for (int64_t i = 0; i < tiles; ++i) {
                pass.reduce(unit, i, work.coefficient(0), work.partial(0), scratch.get(), saved);
            }
            pass.finish(unit, work.partial(0), work.coefficient(0));
            for (int64_t i = 0; i < tiles; ++i) pass.map(unit, i, work.coefficient(0), scratch.get(), saved);
        }
    });
}

// Computes all sums, then all maps, each in parallel over tiles: for fewer units than keep the threads busy.
template <class Pass>
void run_by_tiles(const Pass& pass, int64_t grain) {
    int64_t units = pass.tiling.units(), tiles = pass.tiling.tiles;
    Workspace<Pass> work(pass, units);
    auto for_tiles = [&](auto visit) {
        torch::stable::parallel_for(0, units * tiles, grain, [&](int64_t first, int64_t last) {
            std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(pass.scratch())]);
            for (int64_t i = first; i < last; ++i) visit(i / tiles, i % tiles, scratch.get());
        });
    };
    for (int64_t i = 0; i < units; ++i) pass.prepare(pass.tiling.unit(i), work.coefficient(i));
    for_tiles([&](int64_t i, int64_t tile, float* scratch) {
        pass.reduce(pass.tiling.unit(i), tile, work.coefficient(i), work.partial(i), scratch, nullptr);
    });
    for (int64_t i = 0; i < units; ++i) pass.finish(pass.tiling.unit(i), work.partial(i), work.coefficient(i));
    for_tiles([&](int64_t i, int64_t tile, float* scratch) {
        pass.map(pass.tiling.unit(i), tile, work.coefficient(i), scratch, nullptr);
    });
}

template <class Pass>
void run(const Pass& pass) {
    constexpr int64_t elements_per_thread = 16384;
    const Tiling& tiling = pass.tiling;
    if (tiling.units() == 0) return;
    auto grain = [](int64_t elements) { return std::max<int64_t>(1, elements_per_thread / elements); };
    int64_t threads = torch::stable::get_num_threads();
    if (tiling.units() % threads == 0 || tiling.units() >= 4 * threads || tiling.tiles == 1) {
        run_by_units(pass, grain(tiling.unit_channels * tiling.pixels));
    } else {
        run_by_tiles(pass, grain(tiling.tile_elements()));
    }
}

// Returns how a call's tensors are divided into tiles.
inline Tiling tiling_of(const Shape& s) {
    if (s.samples * s.channels * s.pixels == 0) return {0, s.channels};
    // With one pixel both layouts are the same memory, and vectors run along the channels.
    return make_tiling(s.samples, s.channels, s.pixels, s.groups, s.channels_last || s.pixels == 1);
}

}  // namespace dd::group_norm
