// What a call of group_norm_silu, or of its backward, carries on the CPU and on CUDA.
#pragma once

#include "common/layout.h"

namespace dd::group_norm {

// The shape of y and dy, [samples, channels, pixels]. x has the first x_channels of the channels, and skip the others.
struct Shape {
    int64_t samples, channels, pixels, groups, x_channels;
    bool channels_last;
};

// The options as torch passes them: [C] (weight, bias) and [N, C], empty where absent.
struct OptionOperands {
    Operand weight, bias, pre_shift, scale, shift;
    double eps;
    int activation;  // as in dd_kernels/ops/activation.py; 0 is none
};

// The options as kernels read them: in float32, null where absent.
struct Options {
    const float *weight, *bias, *pre_shift, *scale, *shift;
    double eps;
    int activation;
};

struct ForwardArguments {
    Shape shape;
    OptionOperands options;
    Operand x, residual, skip, y, sum;  // sum is x + residual
    float *mean, *rstd;                 // [N, G]; null where nobody reads them
    float* partials;                    // workspace of the CUDA library
    int64_t partial_count;
};

struct BackwardArguments {
    Shape shape;
    OptionOperands options;
    Operand dy, x, skip, dsum;  // dsum, the gradient of sum, is added to dx
    const float *mean, *rstd;   // [N, G]
    Operand dx, dskip, dweight, dbias, dpre_shift, dscale, dshift;
    float* partials;
    int64_t partial_count;
};

}  // namespace dd::group_norm
