// What the kernels are told beside their large tensors.
#pragma once

namespace dd::group_norm {

// Values [C] (weight, bias) and [N, C] in float32, null where absent.
struct Options {
    const float *weight, *bias, *pre_shift, *scale, *shift;
    double eps;
    int activation;  // as in dd_kernels/ops/activation.py; 0 is none
};

}  // namespace dd::group_norm
