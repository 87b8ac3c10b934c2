#include <torch/csrc/stable/ops.h>

#include "common/cuda_torch.h"
#include "common/tensors.h"
#include "group_norm_silu/cuda.h"
#include "group_norm_silu/cuda_backward.h"

namespace dd::cuda {
namespace {

const void* input(const std::optional<Tensor>& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

void* output(const std::optional<Tensor>& x) { return x.has_value() ? x->mutable_data_ptr() : nullptr; }

// Those that are there.
bool is_aligned(std::initializer_list<std::optional<Tensor>> tensors) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const std::optional<Tensor>& x) { return reinterpret_cast<uintptr_t>(input(x)) % 16 == 0; });
}

// x_channels: those that are not a second tensor's.
NormShape norm_shape(const Tensor& x, int64_t groups, bool aligned, int64_t x_channels) {
    const Layout layout = layout_of(x);
    const int64_t channels = x.size(1);
    const bool last = layout.channels != 1;
    int64_t pixels = last ? layout.pixels : layout.pixels / std::max<int64_t>(channels, 1);
    return {x.size(0), channels, pixels, groups, last, aligned, dtype_of(x), x_channels};
}

NormOptions norm_options(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& pre_shift, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, double eps, int64_t activation) {
    return {data<float>(weight), data<float>(bias),       data<float>(pre_shift), data<float>(scale),
            data<float>(shift),  static_cast<float>(eps), has_silu(activation)};
}

float* floats(const std::optional<Tensor>& x) { return static_cast<float*>(output(x)); }

// partials, where the plan needs so many floats there.
float* room(const std::optional<Tensor>& partials, int64_t needed) {
    if (needed == 0) return nullptr;
    const int64_t given = partials.has_value() ? partials->numel() : 0;
    STD_TORCH_CHECK(given >= needed, "group_norm_silu: partials must have ", needed, " floats; got ", given);
    return floats(partials);
}

// With all that is not common to the forward ops set in a.
void run_forward(NormForward& a, const NormOptions& options, const Tensor& y, const Tensor& mean, const Tensor& rstd,
                 const std::optional<Tensor>& partials, cudaStream_t stream) {
    a.options = options;
    a.y = y.mutable_data_ptr();
    a.mean = floats(mean);
    a.rstd = floats(rstd);
    a.plan = plan_forward(a.shape);
    a.partials = room(partials, forward_partials(a.shape, a.plan));
    group_norm_silu(a, stream);
}

void group_norm_silu_op(Tensor x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
                        double eps, std::optional<Tensor> pre_shift, std::optional<Tensor> scale,
                        std::optional<Tensor> shift, int64_t activation, Tensor y, Tensor mean, Tensor rstd,
                        std::optional<Tensor> partials) {
    if (y.numel() == 0) return;
    OnDevice device(x);
    NormForward a{};
    a.shape = norm_shape(y, num_groups, is_aligned({x, y}), x.size(1));
    a.x = x.const_data_ptr();
    run_forward(a, norm_options(weight, bias, pre_shift, scale, shift, eps, activation), y, mean, rstd, partials,
                device.stream);
}

void join_group_norm_silu_op(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> skip, int64_t num_groups,
                             std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                             std::optional<Tensor> pre_shift, std::optional<Tensor> scale, std::optional<Tensor> shift,
                             int64_t activation, Tensor y, std::optional<Tensor> sum, Tensor mean, Tensor rstd,
                             std::optional<Tensor> partials) {
    if (y.numel() == 0) return;
    OnDevice device(x);
    NormForward a{};
    a.shape = norm_shape(y, num_groups, is_aligned({x, residual, skip, sum, y}), x.size(1));
    a.x = x.const_data_ptr();
    a.residual = input(residual);
    a.skip = input(skip);
    a.sum = output(sum);
    run_forward(a, norm_options(weight, bias, pre_shift, scale, shift, eps, activation), y, mean, rstd, partials,
                device.stream);
}

// What is written for the parameters, where it is asked for.
struct ParameterGradients {
    const std::optional<Tensor>&weight, &bias, &pre_shift, &scale, &shift;
};

// With the shape and all tensors as large as x set in a.
void run_backward(NormBackward& a, const NormOptions& options, const Tensor& mean, const Tensor& rstd,
                  const ParameterGradients& gradients, const std::optional<Tensor>& partials, cudaStream_t stream) {
    a.options = options;
    a.mean = data<float>(mean);
    a.rstd = data<float>(rstd);
    a.dweight = floats(gradients.weight);
    a.dbias = floats(gradients.bias);
    a.dpre_shift = floats(gradients.pre_shift);
    a.dscale = floats(gradients.scale);
    a.dshift = floats(gradients.shift);
    if (a.shape.samples > 0) {
        a.plan = plan_backward(a.shape);
        a.sum_parts = backward_sum_parts(a.shape, a.plan);
    }
    const int64_t of_samples = a.dweight || a.dbias ? per_sample_floats(a.shape) : 0;
    float* partial = room(partials, of_samples + sum_floats(a.shape, a.plan));
    a.per_sample = of_samples > 0 ? partial : nullptr;
    a.sums = partial + of_samples;
    group_norm_silu_backward(a, stream);
}

void group_norm_silu_backward_op(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
                                 std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                 std::optional<Tensor> pre_shift, std::optional<Tensor> scale,
                                 std::optional<Tensor> shift, int64_t activation, Tensor dx,
                                 std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                                 std::optional<Tensor> dpre_shift, std::optional<Tensor> dscale,
                                 std::optional<Tensor> dshift, std::optional<Tensor> partials) {
    OnDevice device(x);
    NormBackward a{};
    a.shape = norm_shape(dy, num_groups, is_aligned({dy, x, dx}), x.size(1));
    a.dy = dy.const_data_ptr();
    a.x = x.const_data_ptr();
    a.dx = dx.mutable_data_ptr();
    run_backward(a, norm_options(weight, bias, pre_shift, scale, shift, eps, activation), mean, rstd,
                 {dweight, dbias, dpre_shift, dscale, dshift}, partials, device.stream);
}

void join_group_norm_silu_backward_op(Tensor dy, std::optional<Tensor> dsum, Tensor x, std::optional<Tensor> skip,
                                      Tensor mean, Tensor rstd, int64_t num_groups, std::optional<Tensor> weight,
                                      std::optional<Tensor> bias, double eps, std::optional<Tensor> pre_shift,
                                      std::optional<Tensor> scale, std::optional<Tensor> shift, int64_t activation,
                                      Tensor dx, std::optional<Tensor> dskip, std::optional<Tensor> dweight,
                                      std::optional<Tensor> dbias, std::optional<Tensor> dpre_shift,
                                      std::optional<Tensor> dscale, std::optional<Tensor> dshift,
                                      std::optional<Tensor> partials) {
    OnDevice device(x);
    NormBackward a{};
    a.shape = norm_shape(dy, num_groups, is_aligned({dy, dsum, x, skip, dx, dskip}), x.size(1));
    a.dy = dy.const_data_ptr();
    a.dsum = input(dsum);
    a.x = x.const_data_ptr();
    a.skip = input(skip);
    a.dx = dx.mutable_data_ptr();
    a.dskip = output(dskip);
    run_backward(a, norm_options(weight, bias, pre_shift, scale, shift, eps, activation), mean, rstd,
                 {dweight, dbias, dpre_shift, dscale, dshift}, partials, device.stream);
}

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) {
    m.impl("group_norm_silu", TORCH_BOX(&dd::cuda::group_norm_silu_op));
    m.impl("group_norm_silu_backward", TORCH_BOX(&dd::cuda::group_norm_silu_backward_op));
    m.impl("join_group_norm_silu", TORCH_BOX(&dd::cuda::join_group_norm_silu_op));
    m.impl("join_group_norm_silu_backward", TORCH_BOX(&dd::cuda::join_group_norm_silu_backward_op));
}
