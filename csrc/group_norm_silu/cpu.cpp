#include "group_norm_silu/two_passes.h"

namespace dd::group_norm {

// Count, mean and sum of squared deviations of some values.
struct Moments {
    double count, mean, m2;

    // Makes these the moments of both sets together (Chan, Golub & LeVeque, 1979).
    void merge(const Moments& other) {
        double total = count + other.count, delta = other.mean - mean;
        mean += delta * (other.count / total);
        m2 += other.m2 + delta * delta * (count * other.count / total);
        count = total;
    }
};

struct Forward {
    Tiling tiling;
    Operand x, y;
    float *mean, *rstd;  // [N, G], or null where nobody reads them
    Options options;
};

}  // namespace dd::group_norm

#define DD_KERNEL "group_norm_silu/cpu_kernel.h"
#include "common/each_isa.h"
#include "group_norm_silu/cpu_parameters.h"

namespace dd::group_norm {
namespace {

struct ForwardPass : Forward {
    using Partial = Moments;
    int64_t partials() const { return tiling.tiles * tiling.unit_groups; }
    int64_t coefficients() const { return 3 * tiling.unit_channels; }
    int64_t scratch() const { return 3 * tiling.unit_channels + tiling.tile_elements(); }
    int64_t saved() const { return 0; }

    void prepare(const Unit&, float*) const {}
    void reduce(const Unit& unit, int64_t tile, const float*, Moments* moments, float* scratch, float*) const {
        DD_CHOOSE(group_norm_reduce)(*this, unit, tile, moments, scratch);
    }
    void finish(const Unit& unit, const Moments* moments, float* coefficients) const {
        DD_CHOOSE(group_norm_finish)(*this, unit, moments, coefficients);
    }
    void map(const Unit& unit, int64_t tile, const float* coefficients, float* scratch, float*) const {
        DD_CHOOSE(group_norm_map)(*this, unit, tile, coefficients, scratch);
    }
};

void group_norm_silu(const ForwardArguments& a, const Tensor&) {
    constexpr const char* wanted = "left out: the CPU's kernel adds and concatenates nothing";
    if (a.residual) refuse("group_norm_silu", "residual", wanted, "a tensor");
    if (a.skip) refuse("group_norm_silu", "skip", wanted, "a tensor");
    OptionFloats floats(a.options, a.shape);
    run(ForwardPass{{tiling_of(a.shape), a.x, a.y, a.mean, a.rstd, floats.options}});
}

constexpr auto op = forward_op<group_norm_silu, baseline::Activations::kCount>;

// Writes the norm as a map of each channel, factor * x + term, instead of its result.
struct AffinePass : ForwardPass {
    float *factor, *term;  // [N, C]

    // The term is that of the rounded factor, so that it alone is rounded: an error of the size of x's own rounding.
    void map(const Unit& unit, int64_t tile, const float* coefficients, float*, float*) const {
        if (tile > 0) return;
        const int64_t count = tiling.unit_channels, at = unit.sample * tiling.channels + unit.first_channel;
        for (int64_t c = 0; c < count; ++c) {
            const double centre = coefficients[c], gain = coefficients[count + c], offset = coefficients[2 * count + c];
            factor[at + c] = static_cast<float>(gain);
            term[at + c] = static_cast<float>(offset - centre * gain);
        }
    }
};

void group_norm_affine(Tensor x, int64_t num_groups, MaybeTensor weight, MaybeTensor bias, double eps,
                       MaybeTensor pre_shift, MaybeTensor scale, MaybeTensor shift, Tensor factor, Tensor term) {
    TensorChecks checks("group_norm_affine", "x", x);
    const Shape shape = shape_of(checks, {}, num_groups);
    const int64_t samples = shape.samples, channels = shape.channels;
    const Operand image = checks.input("x", x);
    const OptionOperands options{checks.parameters("weight", weight, {channels}),
                                 checks.parameters("bias", bias, {channels}),
                                 checks.parameters("pre_shift", pre_shift, {samples, channels}),
                                 checks.parameters("scale", scale, {samples, channels}),
                                 checks.parameters("shift", shift, {samples, channels}),
                                 eps,
                                 0};
    const MaybeTensor written[] = {factor, term};
    float* factors = checks.written_values<float>("factor", written[0], {samples, channels});
    float* terms = checks.written_values<float>("term", written[1], {samples, channels});
    if (shape.pixels == 0) checks.fail("x", "of pixels", "an image of none");
    OptionFloats floats(options, shape);
    run(AffinePass{{{tiling_of(shape), image, {}, nullptr, nullptr, floats.options}}, factors, terms});
}

}  // namespace
}  // namespace dd::group_norm

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) {
    m.impl("group_norm_silu", TORCH_BOX(dd::group_norm::op));
    m.impl("group_norm_affine", TORCH_BOX(dd::group_norm::group_norm_affine));
}
