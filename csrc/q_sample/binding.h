// Registers torch.ops.dd_kernels.q_sample, with checks; run(arguments, x_start) runs a checked call on a device.
#pragma once

#include "common/tensor_checks.h"
#include "q_sample/arguments.h"

namespace dd {

template <void (*run)(const QSampleArguments&, const Tensor&)>
void q_sample_op(Tensor x_start, std::optional<Tensor> noise, Tensor rows, Tensor t, std::optional<Tensor> key,
                 Tensor x_t, std::optional<Tensor> noise_out) {
    TensorChecks checks("q_sample", "x_start", x_start);
    QSampleArguments a{};
    a.layout = checks.layout();
    a.x_start = checks.input("x_start", x_start);
    a.noise = checks.input("noise", noise);
    a.row_count = rows.dim() > 0 ? rows.size(0) : 0;
    a.rows = checks.values<float>("rows", rows, {a.row_count, 2});
    a.t = checks.index("t", t);
    a.key = checks.noise_key("key", key);
    if (!noise && !key) checks.fail("key", "given where noise is not", "neither");
    a.x_t = checks.output("x_t", x_t, a.x_start);
    a.noise_out = checks.output("noise_out", noise_out);
    run(a, x_start);
}

}  // namespace dd
