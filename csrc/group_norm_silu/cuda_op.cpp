#include "common/cuda_torch.h"
#include "group_norm_silu/binding.h"
#include "group_norm_silu/cuda.h"
#include "group_norm_silu/cuda_backward.h"

namespace dd::cuda {
namespace {

using group_norm::BackwardArguments;
using group_norm::ForwardArguments;
using group_norm::OptionOperands;
using group_norm::Shape;

// Returns the values of an operand in float32, or null where it is absent.
float* floats(const char* op, const char* name, const Operand& x) {
    if (x && x.dtype != DType::float32) refuse(op, name, "float32", "another dtype");
    return static_cast<float*>(x.data);
}

Options options_of(const char* op, const OptionOperands& o) {
    return {floats(op, "weight", o.weight),
            floats(op, "bias", o.bias),
            floats(op, "pre_shift", o.pre_shift),
            floats(op, "scale", o.scale),
            floats(op, "shift", o.shift),
            o.eps,
            o.activation};
}

// A tensor [N, C, ...] of a call, and how many channels it has.
struct Image {
    const char* name;
    const Operand& operand;
    int64_t channels;
};

// Returns the shape of a call; refuses tensors whose samples lie apart, which the kernels do not read.
NormShape norm_shape(const char* op, const Shape& s, DType dtype, std::initializer_list<Image> images) {
    bool aligned = true;
    for (const auto& [name, x, channels] : images) {
        if (!x) continue;
        if (s.samples > 1 && s.pixels * channels > 0 && x.sample_stride != s.pixels * channels) {
            refuse(op, name, "dense", "one whose samples lie apart");
        }
        aligned = aligned && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    }
    return {s.samples, s.channels, s.pixels, s.groups, s.channels_last, aligned, dtype, s.x_channels};
}

// Returns partials, which must have as many floats as the plan needs.
float* workspace(const char* op, float* partials, int64_t given, int64_t needed) {
    if (given < needed) refuse(op, "partials", "of " + std::to_string(needed) + " floats", std::to_string(given));
    return partials;
}

void forward(const ForwardArguments& t, const Tensor& x) {
    constexpr const char* op = "group_norm_silu";
    const Shape& s = t.shape;
    const int64_t rest = s.channels - s.x_channels;
    NormForward a{};
    a.shape = norm_shape(op, s, t.x.dtype,
                         {{"x", t.x, s.x_channels},
                          {"residual", t.residual, s.x_channels},
                          {"skip", t.skip, rest},
                          {"sum", t.sum, s.x_channels},
                          {"y", t.y, s.channels}});
    if (s.samples * s.channels * s.pixels == 0) return;
    if (t.mean == nullptr || t.rstd == nullptr) refuse(op, "mean and rstd", "given to the CUDA kernels", "none");
    OnDevice device(x);
    a.options = options_of(op, t.options);
    a.eps = static_cast<float>(t.options.eps);
    a.x = t.x.data;
    a.residual = t.residual.data;
    a.skip = t.skip.data;
    a.sum = t.sum.data;
    a.y = t.y.data;
    a.mean = t.mean;
    a.rstd = t.rstd;
    a.plan = plan_forward(a.shape);
    a.partials = workspace(op, t.partials, t.partial_count, forward_partials(a.shape, a.plan));
    group_norm_silu(a, device.stream);
}

void backward(const BackwardArguments& t, const Tensor& x) {
    constexpr const char* op = "group_norm_silu_backward";
    const Shape& s = t.shape;
    const int64_t rest = s.channels - s.x_channels;
    NormBackward a{};
    a.shape = norm_shape(op, s, t.x.dtype,
                         {{"dy", t.dy, s.channels},
                          {"dsum", t.dsum, s.x_channels},
                          {"x", t.x, s.x_channels},
                          {"skip", t.skip, rest},
                          {"dx", t.dx, s.x_channels},
                          {"dskip", t.dskip, rest}});
    if (s.channels * s.pixels == 0) return;
    OnDevice device(x);
    a.options = options_of(op, t.options);
    a.dy = t.dy.data;
    a.dsum = t.dsum.data;
    a.x = t.x.data;
    a.skip = t.skip.data;
    a.mean = t.mean;
    a.rstd = t.rstd;
    a.dx = t.dx.data;
    a.dskip = t.dskip.data;
    a.dweight = floats(op, "dweight", t.dweight);
    a.dbias = floats(op, "dbias", t.dbias);
    a.dpre_shift = floats(op, "dpre_shift", t.dpre_shift);
    a.dscale = floats(op, "dscale", t.dscale);
    a.dshift = floats(op, "dshift", t.dshift);
    if (s.samples > 0) {
        a.plan = plan_backward(a.shape);
        a.sum_parts = backward_sum_parts(a.shape, a.plan);
    }
    const int64_t of_samples = a.dweight || a.dbias ? per_sample_floats(a.shape) : 0;
    float* partials = workspace(op, t.partials, t.partial_count, of_samples + sum_floats(a.shape, a.plan));
    a.per_sample = of_samples > 0 ? partials : nullptr;
    a.sums = partials + of_samples;
    group_norm_silu_backward(a, device.stream);
}

constexpr auto forward_op = group_norm::forward_op<forward, kActivations>;
constexpr auto backward_op = group_norm::backward_op<backward, kActivations>;

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) {
    m.impl("group_norm_silu", TORCH_BOX(dd::cuda::forward_op));
    m.impl("group_norm_silu_backward", TORCH_BOX(dd::cuda::backward_op));
}
