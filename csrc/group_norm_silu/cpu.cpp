#include "group_norm_silu/two_passes.h"

namespace dd::group_norm {

// Count, mean and sum of squared deviations of some values.
struct Moments {
    double count, mean, m2;

    // Chan, Golub & LeVeque (1979).
    void merge(const Moments& other) {
        double total = count + other.count, delta = other.mean - mean;
        mean += delta * (other.count / total);
        m2 += other.m2 + delta * delta * (count * other.count / total);
        count = total;
    }
};

struct Forward {
    Cut cut;
    Operand x, y;
    float *mean, *rstd;  // null where nobody will read them
    Options options;
};

}  // namespace dd::group_norm

#define DD_KERNEL "group_norm_silu/cpu_kernel.h"
#include "common/each_isa.h"
#include "group_norm_silu/cpu_small.h"

namespace dd::group_norm {
namespace {

struct ForwardPass : Forward {
    using Partial = Moments;
    int64_t partials() const { return cut.pieces * cut.unit_groups; }
    int64_t coefficients() const { return 3 * cut.unit_channels; }
    int64_t scratch() const { return 3 * cut.unit_channels + cut.piece_elements(); }
    int64_t kept() const { return 0; }

    void prepare(const Unit&, float*) const {}
    void reduce(const Unit& unit, int64_t piece, const float*, Moments* moments, float* scratch, float*) const {
        DD_CHOOSE(group_norm_reduce)(*this, unit, piece, moments, scratch);
    }
    void finish(const Unit& unit, const Moments* moments, float* coefficients) const {
        DD_CHOOSE(group_norm_finish)(*this, unit, moments, coefficients);
    }
    void map(const Unit& unit, int64_t piece, const float* coefficients, float* scratch, float*) const {
        DD_CHOOSE(group_norm_map)(*this, unit, piece, coefficients, scratch);
    }
};

float* statistics(const Tensor& x) { return x.numel() == 0 ? nullptr : static_cast<float*>(x.mutable_data_ptr()); }

void group_norm_silu(Tensor x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                     std::optional<Tensor> pre_shift, std::optional<Tensor> scale, std::optional<Tensor> shift,
                     int64_t activation, Tensor y, Tensor mean, Tensor rstd, std::optional<Tensor> /*partials*/) {
    InputFloats w(weight), b(bias), before(pre_shift), factor(scale), after(shift);
    Options options{w, b, before, factor, after, eps, has_silu(activation)};
    run(ForwardPass{{cut_of(x, num_groups), operand(x), operand(y), statistics(mean), statistics(rstd), options}});
}

}  // namespace
}  // namespace dd::group_norm

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) {
    m.impl("group_norm_silu", TORCH_BOX(&dd::group_norm::group_norm_silu));
}
