#include "common/cpu.h"

namespace dd {

struct ReverseStepArguments {
    Layout layout;
    Operand x, out, variance, uncond, noise;
    float guidance_scale;
    const float* threshold;  // [N], or null
    const float* rows;       // [steps, 10]
    const int64_t* timesteps;
    const int64_t* step;  // [1] or [N]
    int64_t step_stride;
    bool draws_noise;
    NoiseKey key;
    Operand x_prev, x0;
};

}  // namespace dd

#define DD_KERNEL "reverse_step/cpu_kernel.h"
#include "common/each_isa.h"

namespace dd {
namespace {

void reverse_step(Tensor x, Tensor out, std::optional<Tensor> variance, std::optional<Tensor> uncond,
                  double guidance_scale, std::optional<Tensor> noise, std::optional<Tensor> threshold, Tensor rows,
                  Tensor timesteps, Tensor step, std::optional<Tensor> key, Tensor x_prev, std::optional<Tensor> x0) {
    ReverseStepArguments a;
    a.layout = layout_of(x);
    a.x = operand(x);
    a.out = operand(out);
    a.variance = operand(variance);
    a.uncond = operand(uncond);
    a.noise = operand(noise);
    a.guidance_scale = static_cast<float>(guidance_scale);
    a.threshold = threshold.has_value() ? data<float>(*threshold) : nullptr;
    a.rows = data<float>(rows);
    a.timesteps = data<int64_t>(timesteps);
    a.step = data<int64_t>(step);
    a.step_stride = per_sample(step);
    a.draws_noise = key.has_value();
    a.key = noise_key(key);
    a.x_prev = operand(x_prev);
    a.x0 = operand(x0);
    run_tiles(a, 6, DD_CHOOSE(reverse_step));
}

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("reverse_step", TORCH_BOX(&dd::reverse_step)); }
