// GroupNorm forward and backward have one shape: sums over a unit, then a map over it that needs them.
#pragma once

#include "common/cpu.h"
#include "group_norm_silu/pieces.h"

namespace dd::group_norm {

// The memory that goes with some units; one allocation each, not initialised.
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

// Unit by unit, so that the map finds in the cache what the sums have read.
template <class Pass>
void run_by_units(const Pass& pass, int64_t grain) {
    int64_t pieces = pass.cut.pieces;
    torch::stable::parallel_for(0, pass.cut.units(), grain, [&](int64_t first, int64_t last) {
        Workspace<Pass> work(pass, 1);
        std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(pass.scratch() + pass.kept())]);
        float* kept = pass.kept() == 0 ? nullptr : scratch.get() + pass.scratch();
        for (int64_t index = first; index < last; ++index) {
            Unit unit = pass.cut.unit(index);
            pass.prepare(unit, work.coefficient(0));
            for (int64_t i = 0; i < pieces; ++i) {
                pass.reduce(unit, i, work.coefficient(0), work.partial(0), scratch.get(), kept);
            }
            pass.finish(unit, work.partial(0), work.coefficient(0));
            for (int64_t i = 0; i < pieces; ++i) pass.map(unit, i, work.coefficient(0), scratch.get(), kept);
        }
    });
}

// Too few units for the threads: all sums, then all maps, each cut into pieces.
template <class Pass>
void run_by_pieces(const Pass& pass, int64_t grain) {
    int64_t units = pass.cut.units(), pieces = pass.cut.pieces;
    Workspace<Pass> work(pass, units);
    auto for_pieces = [&](auto visit) {
        torch::stable::parallel_for(0, units * pieces, grain, [&](int64_t first, int64_t last) {
            std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(pass.scratch())]);
            for (int64_t i = first; i < last; ++i) visit(i / pieces, i % pieces, scratch.get());
        });
    };
    for (int64_t i = 0; i < units; ++i) pass.prepare(pass.cut.unit(i), work.coefficient(i));
    for_pieces([&](int64_t i, int64_t piece, float* scratch) {
        pass.reduce(pass.cut.unit(i), piece, work.coefficient(i), work.partial(i), scratch, nullptr);
    });
    for (int64_t i = 0; i < units; ++i) pass.finish(pass.cut.unit(i), work.partial(i), work.coefficient(i));
    for_pieces([&](int64_t i, int64_t piece, float* scratch) {
        pass.map(pass.cut.unit(i), piece, work.coefficient(i), scratch, nullptr);
    });
}

template <class Pass>
void run(const Pass& pass) {
    constexpr int64_t elements_per_thread = 16384;
    const Cut& cut = pass.cut;
    if (cut.units() == 0) return;
    auto grain = [](int64_t elements) { return std::max<int64_t>(1, elements_per_thread / elements); };
    int64_t threads = torch::stable::get_num_threads();
    if (cut.units() % threads == 0 || cut.units() >= 4 * threads || cut.pieces == 1) {
        run_by_units(pass, grain(cut.unit_channels * cut.pixels));
    } else {
        run_by_pieces(pass, grain(cut.piece_elements()));
    }
}

inline Cut cut_of(const Tensor& x, int64_t groups) {
    int64_t samples = x.size(0), channels = x.size(1), elements = x.numel();
    if (elements == 0) return {0, channels};
    int64_t pixels = elements / (samples * channels);
    bool contiguous = x.is_contiguous();
    STD_TORCH_CHECK(contiguous || is_channels_last(x), "dd_kernels: x must be contiguous or channels_last");
    // One pixel is the same memory in both layouts, and channels are what there are many of.
    return cut(samples, channels, pixels, groups, !contiguous || pixels == 1);
}

}  // namespace dd::group_norm
