#include "common/cpu.h"

namespace dd {

struct QSampleArguments {
    Layout layout;
    Operand x_start, noise;
    const float* rows;  // [T, 2]
    const int64_t* t;   // [1] or [N]
    int64_t t_stride;
    NoiseKey key;
    Operand x_t, noise_out;
};

}  // namespace dd

#define DD_KERNEL "q_sample/cpu_kernel.h"
#include "common/each_isa.h"

namespace dd {
namespace {

void q_sample(Tensor x_start, std::optional<Tensor> noise, Tensor rows, Tensor t, std::optional<Tensor> key, Tensor x_t,
              std::optional<Tensor> noise_out) {
    QSampleArguments a{layout_of(x_start), operand(x_start), operand(noise), data<float>(rows), data<int64_t>(t),
                       per_sample(t),      noise_key(key),   operand(x_t),   operand(noise_out)};
    run_tiles(a, 3, DD_CHOOSE(q_sample));
}

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("q_sample", TORCH_BOX(&dd::q_sample)); }
