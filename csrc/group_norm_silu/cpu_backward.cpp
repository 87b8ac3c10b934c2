#include "group_norm_silu/two_passes.h"

namespace dd::group_norm {

// Points to the sums over the pixels of each channel of a unit from which all gradients follow, with d = x - centre.
// d itself is summed only for the gradient of pre_shift.
struct ChannelSums {
    double *dz, *dz_d, *d;

    // Locates the sums of one part of the pixels, from channel `first` on, within those of all parts.
    ChannelSums(double* sums, int64_t channels, int64_t part, int64_t first)
        : dz(sums + 3 * part * channels + first), dz_d(dz + channels), d(dz_d + channels) {}
};

struct Backward {
    Tiling tiling;
    Operand dy, x, dx;
    const float *mean, *rstd;
    Options options;
    float *dpre_shift, *dscale, *dshift;  // [N, C], or null where not wanted
    double *dweight_parts, *dbias_parts;  // [N, C]: what each sample adds to dweight and dbias
};

}  // namespace dd::group_norm

#define DD_KERNEL "group_norm_silu/cpu_backward_kernel.h"
#include "common/each_isa.h"
#include "group_norm_silu/cpu_parameters.h"

namespace dd::group_norm {
namespace {

struct BackwardPass : Backward {
    using Partial = double;
    int64_t partials() const { return 3 * tiling.parts * tiling.unit_channels; }
    int64_t coefficients() const { return 5 * tiling.unit_channels; }
    int64_t scratch() const { return 2 * tiling.unit_channels + 3 * tiling.tile_elements(); }
    // Returns how many floats hold dz of a unit between the two steps: one per element if dx has 16 bits, and so cannot
    // hold dz, and the unit is small enough; else none.
    int64_t saved() const {
        int64_t elements = tiling.unit_channels * tiling.pixels;
        return options.activation != 0 && dx.dtype != DType::float32 && elements <= int64_t{1} << 18 ? elements : 0;
    }

    void prepare(const Unit& unit, float* coefficients) const {
        DD_CHOOSE(group_norm_backward_prepare)(*this, unit, coefficients);
    }
    void reduce(const Unit& unit, int64_t tile, const float* coefficients, double* sums, float* scratch,
                float* saved) const {
        DD_CHOOSE(group_norm_backward_reduce)(*this, unit, tile, coefficients, sums, scratch, saved);
    }
    void finish(const Unit& unit, double* sums, float* coefficients) const {
        DD_CHOOSE(group_norm_backward_finish)(*this, unit, sums, coefficients);
    }
    void map(const Unit& unit, int64_t tile, const float* coefficients, float* scratch, float* saved) const {
        DD_CHOOSE(group_norm_backward_map)(*this, unit, tile, coefficients, scratch, saved);
    }
};

// Sums [N, C] over the samples, in their order.
void sum_samples(const double* parts, int64_t samples, int64_t channels, float* out) {
    constexpr int64_t block = 64;
    int64_t grain = std::max<int64_t>(1, 16384 / (samples * block + 1));
    torch::stable::parallel_for(0, ceil_div(channels, block), grain, [&](int64_t first, int64_t last) {
        for (int64_t start = first * block; start < std::min(channels, last * block); start += block) {
            int64_t width = std::min(block, channels - start);
            double totals[block] = {};
            for (int64_t n = 0; n < samples; ++n) {
                for (int64_t c = 0; c < width; ++c) totals[c] += parts[n * channels + start + c];
            }
            for (int64_t c = 0; c < width; ++c) out[start + c] = static_cast<float>(totals[c]);
        }
    });
}

void group_norm_silu_backward(const BackwardArguments& a, const Tensor&) {
    constexpr const char* wanted = "left out: the CPU's kernel adds and concatenates nothing";
    if (a.dsum) refuse("group_norm_silu_backward", "dsum", wanted, "a tensor");
    if (a.skip) refuse("group_norm_silu_backward", "skip", wanted, "a tensor");
    const int64_t channels = a.shape.channels, per_sample = a.shape.samples * channels;
    OptionFloats floats(a.options, a.shape);
    OutputFloats dweight(a.dweight, channels), dbias(a.dbias, channels), dpre_shift(a.dpre_shift, per_sample);
    OutputFloats dscale(a.dscale, per_sample), dshift(a.dshift, per_sample);
    Tiling tiling = tiling_of(a.shape);
    std::unique_ptr<double[]> parts(new double[static_cast<size_t>(2 * per_sample)]);
    double *dweight_parts = parts.get(), *dbias_parts = dweight_parts + per_sample;
    run(BackwardPass{{tiling, a.dy, a.x, a.dx, a.mean, a.rstd, floats.options, dpre_shift, dscale, dshift,
                      dweight_parts, dbias_parts}});
    if (dweight != nullptr) sum_samples(dweight_parts, tiling.samples, channels, dweight);
    if (dbias != nullptr) sum_samples(dbias_parts, tiling.samples, channels, dbias);
}

constexpr auto op = backward_op<group_norm_silu_backward, baseline::Activations::kCount>;

}  // namespace
}  // namespace dd::group_norm

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("group_norm_silu_backward", TORCH_BOX(dd::group_norm::op)); }
