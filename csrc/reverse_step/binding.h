// torch.ops.dd_kernels.reverse_step, checked; run(arguments, x) is what a device does with it.
#pragma once

#include "common/tensor_checks.h"
#include "reverse_step/arguments.h"

namespace dd {

template <void (*run)(const ReverseStepArguments&, const Tensor&)>
void reverse_step_op(Tensor x, Tensor out, std::optional<Tensor> variance, std::optional<Tensor> uncond,
                     double guidance_scale, std::optional<Tensor> noise, std::optional<Tensor> threshold, Tensor rows,
                     Tensor timesteps, Tensor step, std::optional<Tensor> key, Tensor x_prev, std::optional<Tensor> x0,
                     std::optional<Tensor> even, std::optional<Tensor> odd) {
    TensorChecks checks("reverse_step", "x", x);
    ReverseStepArguments a{};
    a.layout = checks.layout();
    a.x = checks.input("x", x);
    a.out = checks.input("out", out);
    a.variance = checks.input("variance", variance);
    a.uncond = checks.input("uncond", uncond);
    a.noise = checks.input("noise", noise);
    a.guidance_scale = static_cast<float>(guidance_scale);
    a.threshold = checks.values<float>("threshold", threshold, {x.size(0)});
    a.row_count = rows.dim() > 0 ? rows.size(0) : 0;
    a.rows = checks.values<float>("rows", rows, {a.row_count, kStepColumns});
    a.timesteps = checks.values<int64_t>("timesteps", timesteps, {a.row_count});
    a.step = checks.index("step", step);
    a.key = checks.noise_key("key", key);
    a.x_prev = checks.output("x_prev", x_prev, a.x);
    a.x0 = checks.output("x0", x0);
    a.even = checks.output("even", even);
    a.odd = checks.output("odd", odd);
    if (odd && !even) checks.fail("even", "given with odd", "none");
    run(a, x);
}

}  // namespace dd
