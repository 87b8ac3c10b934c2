#include <torch/csrc/stable/ops.h>

#include "common/cuda_torch.h"
#include "group_norm_silu/arguments.h"
#include "group_norm_silu/cuda.h"
#include "group_norm_silu/cuda_backward.h"

namespace dd::cuda {
namespace {

using group_norm::BackwardTensors;
using group_norm::ForwardTensors;
using group_norm::MaybeTensor;
using group_norm::OptionTensors;

const void* input(const MaybeTensor& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

void* output(const MaybeTensor& x) { return x.has_value() ? x->mutable_data_ptr() : nullptr; }

float* floats(const MaybeTensor& x) { return static_cast<float*>(output(x)); }

// Whether all tensors that are there start at a multiple of 16 bytes.
bool are_aligned(std::initializer_list<MaybeTensor> tensors) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const MaybeTensor& x) { return reinterpret_cast<uintptr_t>(input(x)) % 16 == 0; });
}

// The shape of y or dy; x has x_channels of its channels, skip the others.
NormShape norm_shape(const Tensor& y, int64_t groups, bool aligned, int64_t x_channels) {
    const Layout layout = layout_of(y);
    const int64_t channels = y.size(1);
    const bool last = layout.channels != 1;
    int64_t pixels = last ? layout.pixels : layout.pixels / std::max<int64_t>(channels, 1);
    return {y.size(0), channels, pixels, groups, last, aligned, dtype_of(y), x_channels};
}

Options options_of(const OptionTensors& o) {
    STD_TORCH_CHECK(o.activation >= 0 && o.activation < activation_count(), "dd_kernels: activation must be in [0, ",
                    activation_count(), "); got ", o.activation);
    return {data<float>(o.weight),         data<float>(o.bias),  data<float>(o.pre_shift),
            data<float>(o.scale),          data<float>(o.shift), o.eps,
            static_cast<int>(o.activation)};
}

// Returns the address of partials, which must have as many floats as the plan needs.
float* workspace(const MaybeTensor& partials, int64_t needed) {
    if (needed == 0) return nullptr;
    const int64_t given = partials.has_value() ? partials->numel() : 0;
    STD_TORCH_CHECK(given >= needed, "group_norm_silu: partials must have ", needed, " floats; got ", given);
    return floats(partials);
}

void forward(const ForwardTensors& t) {
    if (t.y.numel() == 0) return;
    STD_TORCH_CHECK(t.mean && t.rstd, "group_norm_silu: the CUDA kernels write mean and rstd");
    OnDevice device(t.x);
    NormForward a{};
    a.shape = norm_shape(t.y, t.options.num_groups, are_aligned({t.x, t.residual, t.skip, t.sum, t.y}), t.x.size(1));
    a.options = options_of(t.options);
    a.eps = static_cast<float>(t.options.eps);
    a.x = t.x.const_data_ptr();
    a.residual = input(t.residual);
    a.skip = input(t.skip);
    a.sum = output(t.sum);
    a.y = t.y.mutable_data_ptr();
    a.mean = floats(t.mean);
    a.rstd = floats(t.rstd);
    a.plan = plan_forward(a.shape);
    a.partials = workspace(t.partials, forward_partials(a.shape, a.plan));
    group_norm_silu(a, device.stream);
}

void backward(const BackwardTensors& t) {
    OnDevice device(t.x);
    NormBackward a{};
    const bool aligned = are_aligned({t.dy, t.dsum, t.x, t.skip, t.dx, t.dskip});
    a.shape = norm_shape(t.dy, t.options.num_groups, aligned, t.x.size(1));
    a.options = options_of(t.options);
    a.dy = t.dy.const_data_ptr();
    a.dsum = input(t.dsum);
    a.x = t.x.const_data_ptr();
    a.skip = input(t.skip);
    a.mean = data<float>(t.mean);
    a.rstd = data<float>(t.rstd);
    a.dx = t.dx.mutable_data_ptr();
    a.dskip = output(t.dskip);
    a.dweight = floats(t.dweight);
    a.dbias = floats(t.dbias);
    a.dpre_shift = floats(t.dpre_shift);
    a.dscale = floats(t.dscale);
    a.dshift = floats(t.dshift);
    if (a.shape.samples > 0) {
        a.plan = plan_backward(a.shape);
        a.sum_parts = backward_sum_parts(a.shape, a.plan);
    }
    const int64_t of_samples = a.dweight || a.dbias ? per_sample_floats(a.shape) : 0;
    float* partials = workspace(t.partials, of_samples + sum_floats(a.shape, a.plan));
    a.per_sample = of_samples > 0 ? partials : nullptr;
    a.sums = partials + of_samples;
    group_norm_silu_backward(a, device.stream);
}

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) {
    m.impl("group_norm_silu", TORCH_BOX(&dd::group_norm::forward_op<dd::cuda::forward>));
    m.impl("group_norm_silu_backward", TORCH_BOX(&dd::group_norm::backward_op<dd::cuda::backward>));
}
