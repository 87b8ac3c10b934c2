// Registers torch.ops.dd_kernels.group_norm_silu and its backward, with checks; run(arguments, x) runs a checked call
// on a device.
#pragma once

#include "common/tensor_checks.h"
#include "group_norm_silu/arguments.h"

namespace dd::group_norm {

using MaybeTensor = std::optional<Tensor>;

// Reads the shape of a call from x [N, C, ...], which the checks hold, and the tensor that holds the channels after
// x's.
inline Shape shape_of(const TensorChecks& checks, const MaybeTensor& skip, int64_t num_groups) {
    const TensorFacts& x = checks.x();
    if (x.dims < 2) checks.fail("x", "[N, C, ...]", "a tensor of " + std::to_string(x.dims) + " dimensions");
    if (skip && skip->dim() != x.dims) {
        checks.fail("skip", "of the dimensions of x", "a tensor of " + std::to_string(skip->dim()) + " dimensions");
    }
    const int64_t samples = x.sizes[0], x_channels = x.sizes[1];
    const int64_t channels = x_channels + (skip ? skip->size(1) : 0);
    if (num_groups < 1 || channels % num_groups != 0) {
        checks.fail("num_groups", "a divisor of the channels, " + std::to_string(channels), std::to_string(num_groups));
    }
    int64_t pixels = 1;
    for (int64_t d = 2; d < x.dims; ++d) pixels *= x.sizes[d];
    return {samples, channels, pixels, num_groups, x_channels, checks.layout().channels != 1};
}

inline int checked_activation(const TensorChecks& checks, int64_t activation, int count) {
    if (activation < 0 || activation >= count) {
        checks.fail("activation", "in [0, " + std::to_string(count) + ")", std::to_string(activation));
    }
    return static_cast<int>(activation);
}

// Checks that an operand that is there has the dtype of x.
inline Operand same_dtype(const TensorChecks& checks, const char* name, const Operand& y, const Operand& x) {
    if (y && y.dtype != x.dtype) checks.fail(name, "of the dtype of x", "another dtype");
    return y;
}

inline int64_t count_of(const MaybeTensor& x) { return x ? x->numel() : 0; }

// `activations` is the number of activations that the library has.
template <void (*run)(const ForwardArguments&, const Tensor&), int activations>
void forward_op(Tensor x, int64_t num_groups, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor pre_shift,
                MaybeTensor scale, MaybeTensor shift, int64_t activation, Tensor y, MaybeTensor mean, MaybeTensor rstd,
                MaybeTensor partials, MaybeTensor residual, MaybeTensor skip, MaybeTensor sum) {
    TensorChecks checks("group_norm_silu", "x", x);
    ForwardArguments a{};
    a.shape = shape_of(checks, skip, num_groups);
    const int64_t samples = a.shape.samples, channels = a.shape.channels;
    if (sum.has_value() != residual.has_value()) checks.fail("sum", "given where residual is", "only one of them");
    a.x = checks.input("x", x);
    a.residual = same_dtype(checks, "residual", checks.input("residual", residual), a.x);
    a.skip = same_dtype(checks, "skip", checks.input("skip", skip, channels - a.shape.x_channels), a.x);
    a.options = {checks.parameters("weight", weight, {channels}),
                 checks.parameters("bias", bias, {channels}),
                 checks.parameters("pre_shift", pre_shift, {samples, channels}),
                 checks.parameters("scale", scale, {samples, channels}),
                 checks.parameters("shift", shift, {samples, channels}),
                 eps,
                 checked_activation(checks, activation, activations)};
    a.y = same_dtype(checks, "y", checks.output("y", y, {}, channels), a.x);
    a.sum = same_dtype(checks, "sum", checks.output("sum", sum), a.x);
    a.mean = checks.written_values<float>("mean", mean, {samples, num_groups});
    a.rstd = checks.written_values<float>("rstd", rstd, {samples, num_groups});
    a.partial_count = count_of(partials);
    a.partials = checks.written_values<float>("partials", partials, {a.partial_count});
    run(a, x);
}

template <void (*run)(const BackwardArguments&, const Tensor&), int activations>
void backward_op(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups, MaybeTensor weight,
                 MaybeTensor bias, double eps, MaybeTensor pre_shift, MaybeTensor scale, MaybeTensor shift,
                 int64_t activation, Tensor dx, MaybeTensor dweight, MaybeTensor dbias, MaybeTensor dpre_shift,
                 MaybeTensor dscale, MaybeTensor dshift, MaybeTensor partials, MaybeTensor skip, MaybeTensor dsum,
                 MaybeTensor dskip) {
    TensorChecks checks("group_norm_silu_backward", "x", x);
    BackwardArguments a{};
    a.shape = shape_of(checks, skip, num_groups);
    const int64_t samples = a.shape.samples, channels = a.shape.channels, skips = channels - a.shape.x_channels;
    if (dskip.has_value() != skip.has_value()) checks.fail("dskip", "given where skip is", "only one of them");
    a.x = checks.input("x", x);
    a.dy = same_dtype(checks, "dy", checks.input("dy", dy, channels), a.x);
    a.skip = same_dtype(checks, "skip", checks.input("skip", skip, skips), a.x);
    a.dsum = same_dtype(checks, "dsum", checks.input("dsum", dsum), a.x);
    a.mean = checks.values<float>("mean", mean, {samples, num_groups});
    a.rstd = checks.values<float>("rstd", rstd, {samples, num_groups});
    a.options = {checks.parameters("weight", weight, {channels}),
                 checks.parameters("bias", bias, {channels}),
                 checks.parameters("pre_shift", pre_shift, {samples, channels}),
                 checks.parameters("scale", scale, {samples, channels}),
                 checks.parameters("shift", shift, {samples, channels}),
                 eps,
                 checked_activation(checks, activation, activations)};
    a.dx = same_dtype(checks, "dx", checks.output("dx", dx), a.x);
    a.dskip = same_dtype(checks, "dskip", checks.output("dskip", dskip, {}, skips), a.x);
    a.dweight = checks.written_parameters("dweight", dweight, {channels});
    a.dbias = checks.written_parameters("dbias", dbias, {channels});
    a.dpre_shift = checks.written_parameters("dpre_shift", dpre_shift, {samples, channels});
    a.dscale = checks.written_parameters("dscale", dscale, {samples, channels});
    a.dshift = checks.written_parameters("dshift", dshift, {samples, channels});
    a.partial_count = count_of(partials);
    a.partials = checks.written_values<float>("partials", partials, {a.partial_count});
    run(a, x);
}

}  // namespace dd::group_norm
