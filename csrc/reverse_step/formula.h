// The one update that every step of a sampler is, with other coefficients. Included once per instruction set.

#include "common/host_device.h"

namespace dd::DD_ISA {

// One row of a StepTable: its columns, in the order of dd_kernels/ops/reverse_step/table.py.
struct StepRow {
    float x0_num_x, x0_num_out, x0_den, x0_clip;
    float prev_from_x0, prev_from_x, prev_from_out, sigma;
    float log_var_min, log_var_max;
    float prev_from_last, prev_from_older;
};

// Classifier-free guidance (Ho and Salimans, 2022, eq. 6), with scale = w + 1.
template <class Value>
DD_HOST_DEVICE Value guide(Value out, Value uncond, float scale) {
    return fma(out - uncond, scale, uncond);
}

// x0 is clipped to [-limit, limit]; dynamic thresholding (Saharia et al., 2022, section 2.3) then divides it by limit.
struct Clip {
    float limit;
    bool divide;
};

// The row keeps numerator and denominator apart: where no signal is left the denominator is 0, and +-inf can be
// clipped. Both divisions are of a number per sample, which the compiler moves out of the loop over elements.
template <class Value>
DD_HOST_DEVICE Value predict_x0(Value x, Value out, const StepRow& row, const Clip& clip) {
    Value x0 = fma(x, row.x0_num_x, out * row.x0_num_out) * (1.0f / row.x0_den);
    x0 = clamp(x0, -clip.limit, clip.limit);
    return clip.divide ? x0 * (1.0f / clip.limit) : x0;
}

// The mean of q(x_{t-1} | x_t, x_0) (Ho et al., 2020, eq. 7), or DDIM's (Song et al., 2021, eq. 12).
// A term whose coefficient is 0 is left out, whatever it would multiply.
template <class Value>
DD_HOST_DEVICE Value step_mean(Value x0, Value x, Value out, const StepRow& row) {
    Value mean = x0 * row.prev_from_x0;
    if (row.prev_from_x != 0.0f) mean = fma(x, row.prev_from_x, mean);
    if (row.prev_from_out != 0.0f) mean = fma(out, row.prev_from_out, mean);
    return mean;
}

// The standard deviation by a model that interpolates between two log-variances (Nichol and Dhariwal, 2021, eq. 15),
// with `variance` in [-1, 1]. row.sigma is then 1, or 0 in a step that adds no noise; for other models it is the
// deviation.
template <class Value>
DD_HOST_DEVICE Value learned_sigma(Value variance, const StepRow& row) {
    Value log_variance = fma((variance + 1.0f) * 0.5f, row.log_var_max - row.log_var_min, row.log_var_min);
    return exp(log_variance * 0.5f) * row.sigma;
}

}  // namespace dd::DD_ISA
