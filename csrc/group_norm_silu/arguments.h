// What torch.ops.dd_kernels.group_norm_silu and its backward carry, listed once for the CPU and the CUDA library.
#pragma once

#include <utility>

#include "common/tensors.h"

namespace dd::group_norm {

using MaybeTensor = std::optional<Tensor>;

// What both passes are told beside their large tensors.
struct OptionTensors {
    int64_t num_groups;
    MaybeTensor weight, bias;  // [C]
    double eps;
    MaybeTensor pre_shift, scale, shift;  // [N, C]
    int64_t activation;                   // as in dd_kernels/ops/activation.py
};

struct ForwardTensors {
    Tensor x;
    OptionTensors options;
    Tensor y;
    MaybeTensor mean, rstd;      // [N, G]; only the CPU library can do without
    MaybeTensor partials;        // workspace of the CUDA library
    MaybeTensor residual, skip;  // null but for the CUDA library
    MaybeTensor sum;             // x + residual
};

struct BackwardTensors {
    Tensor dy, x, mean, rstd;
    OptionTensors options;
    Tensor dx;
    MaybeTensor dweight, dbias, dpre_shift, dscale, dshift;
    MaybeTensor partials;
    MaybeTensor skip, dsum, dskip;
};

// The op as torch calls it, with the arguments of its schema, run by `kernel` of one library.
template <void (*kernel)(const ForwardTensors&)>
void forward_op(Tensor x, int64_t num_groups, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor pre_shift,
                MaybeTensor scale, MaybeTensor shift, int64_t activation, Tensor y, MaybeTensor mean, MaybeTensor rstd,
                MaybeTensor partials, MaybeTensor residual, MaybeTensor skip, MaybeTensor sum) {
    kernel({std::move(x),
            {num_groups, std::move(weight), std::move(bias), eps, std::move(pre_shift), std::move(scale),
             std::move(shift), activation},
            std::move(y),
            std::move(mean),
            std::move(rstd),
            std::move(partials),
            std::move(residual),
            std::move(skip),
            std::move(sum)});
}

template <void (*kernel)(const BackwardTensors&)>
void backward_op(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups, MaybeTensor weight,
                 MaybeTensor bias, double eps, MaybeTensor pre_shift, MaybeTensor scale, MaybeTensor shift,
                 int64_t activation, Tensor dx, MaybeTensor dweight, MaybeTensor dbias, MaybeTensor dpre_shift,
                 MaybeTensor dscale, MaybeTensor dshift, MaybeTensor partials, MaybeTensor skip, MaybeTensor dsum,
                 MaybeTensor dskip) {
    kernel({std::move(dy),
            std::move(x),
            std::move(mean),
            std::move(rstd),
            {num_groups, std::move(weight), std::move(bias), eps, std::move(pre_shift), std::move(scale),
             std::move(shift), activation},
            std::move(dx),
            std::move(dweight),
            std::move(dbias),
            std::move(dpre_shift),
            std::move(dscale),
            std::move(dshift),
            std::move(partials),
            std::move(skip),
            std::move(dsum),
            std::move(dskip)});
}

}  // namespace dd::group_norm
