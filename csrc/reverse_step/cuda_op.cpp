#include "common/cuda_torch.h"
#include "common/tensors.h"
#include "reverse_step/cuda.h"

namespace dd::cuda {
namespace {

void reverse_step_op(Tensor x, Tensor out, std::optional<Tensor> variance, std::optional<Tensor> uncond,
                     double guidance_scale, std::optional<Tensor> noise, std::optional<Tensor> threshold, Tensor rows,
                     Tensor timesteps, Tensor step, std::optional<Tensor> key, Tensor x_prev,
                     std::optional<Tensor> x0) {
    OnDevice device(x);
    ReverseStepArguments a{};
    a.layout = layout_of(x);
    a.x = operand(x);
    a.out = operand(out);
    a.variance = operand(variance);
    a.uncond = operand(uncond);
    a.noise = operand(noise);
    a.guidance_scale = static_cast<float>(guidance_scale);
    a.threshold = data<float>(threshold);
    a.rows = data<float>(rows);
    a.row_count = rows.size(0);
    a.timesteps = data<int64_t>(timesteps);
    a.step = data<int64_t>(step);
    a.step_stride = per_sample(step);
    a.key = data<int64_t>(key);
    a.x_prev = operand(x_prev);
    a.x0 = operand(x0);
    reverse_step(a, device.stream);
}

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) { m.impl("reverse_step", TORCH_BOX(&dd::cuda::reverse_step_op)); }
