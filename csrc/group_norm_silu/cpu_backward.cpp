#include "group_norm_silu/two_passes.h"

namespace dd::group_norm {

// Over pixels of each channel of a unit, with d = x - centre. All gradients follow from these; d itself is summed
// only for that of pre_shift.
struct ChannelSums {
    double *dz, *dz_d, *d;

    // Of a part of the pixels, from a channel on, within the sums of all parts.
    ChannelSums(double* sums, int64_t channels, int64_t part, int64_t first)
        : dz(sums + 3 * part * channels + first), dz_d(dz + channels), d(dz_d + channels) {}
};

struct Backward {
    Cut cut;
    Operand dy, x, dx;
    const float *mean, *rstd;
    Options options;
    float *dpre_shift, *dscale, *dshift;  // [N, C], or null where not wanted
    double *dweight_parts, *dbias_parts;  // [N, C] too: what each sample adds
};

}  // namespace dd::group_norm

#define DD_KERNEL "group_norm_silu/cpu_backward_kernel.h"
#include "common/each_isa.h"
#include "group_norm_silu/cpu_small.h"

namespace dd::group_norm {
namespace {

struct BackwardPass : Backward {
    using Partial = double;
    int64_t partials() const { return 3 * cut.parts * cut.unit_channels; }
    int64_t coefficients() const { return 5 * cut.unit_channels; }
    int64_t scratch() const { return 2 * cut.unit_channels + 3 * cut.piece_elements(); }
    // dz of a unit, where dx has no room for it and it is no large tensor of its own.
    int64_t kept() const {
        int64_t elements = cut.unit_channels * cut.pixels;
        return options.silu && dx.dtype != DType::float32 && elements <= int64_t{1} << 18 ? elements : 0;
    }

    void prepare(const Unit& unit, float* coefficients) const {
        DD_CHOOSE(group_norm_backward_prepare)(*this, unit, coefficients);
    }
    void reduce(const Unit& unit, int64_t piece, const float* coefficients, double* sums, float* scratch,
                float* kept) const {
        DD_CHOOSE(group_norm_backward_reduce)(*this, unit, piece, coefficients, sums, scratch, kept);
    }
    void finish(const Unit& unit, double* sums, float* coefficients) const {
        DD_CHOOSE(group_norm_backward_finish)(*this, unit, sums, coefficients);
    }
    void map(const Unit& unit, int64_t piece, const float* coefficients, float* scratch, float* kept) const {
        DD_CHOOSE(group_norm_backward_map)(*this, unit, piece, coefficients, scratch, kept);
    }
};

// One sum over the samples per channel, in the order of the samples.
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

void group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
                              std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                              std::optional<Tensor> pre_shift, std::optional<Tensor> scale, std::optional<Tensor> shift,
                              int64_t activation, Tensor dx, std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                              std::optional<Tensor> dpre_shift, std::optional<Tensor> dscale,
                              std::optional<Tensor> dshift, std::optional<Tensor> /*partials*/) {
    InputFloats w(weight), b(bias), before(pre_shift), factor(scale), after(shift);
    Options options{w, b, before, factor, after, eps, has_silu(activation)};
    OutputFloats dw(dweight), db(dbias), dbefore(dpre_shift), dfactor(dscale), dafter(dshift);
    Cut cut = cut_of(x, num_groups);
    std::unique_ptr<double[]> parts(new double[static_cast<size_t>(2 * cut.samples * cut.channels)]);
    double *dweight_parts = parts.get(), *dbias_parts = dweight_parts + cut.samples * cut.channels;
    const float *means = static_cast<const float*>(mean.const_data_ptr()),
                *rstds = static_cast<const float*>(rstd.const_data_ptr());
    run(BackwardPass{{cut, operand(dy), operand(x), operand(dx), means, rstds, options, dbefore, dfactor, dafter,
                      dweight_parts, dbias_parts}});
    if (dw != nullptr) sum_samples(dweight_parts, cut.samples, cut.channels, dw);
    if (db != nullptr) sum_samples(dbias_parts, cut.samples, cut.channels, db);
}

}  // namespace
}  // namespace dd::group_norm

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) {
    m.impl("group_norm_silu_backward", TORCH_BOX(&dd::group_norm::group_norm_silu_backward));
}
