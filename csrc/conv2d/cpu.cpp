#include "common/cpu.h"
#include "conv2d/bindings.h"
#include "conv2d/cpu_bfloat16.h"
#include "conv2d/plan.h"

#define DD_KERNEL "conv2d/cpu_kernel.h"
#define DD_WIDEST avx512
#include "common/each_isa.h"

namespace dd::conv2d {
namespace {

// The kernels of one instruction set.
struct Kernels {
    decltype(&baseline::conv2d_pack) pack;
    decltype(&baseline::conv2d_multiply) multiply;
};

// Products are of bfloat16 where that is asked for and the processor has them, else of float32.
Kernels kernels_for(bool bfloat16) {
    if (bfloat16 && has_dot_bfloat16()) return {dot_bfloat16_pack, dot_bfloat16_multiply};
    return {DD_CHOOSE(conv2d_pack), DD_CHOOSE(conv2d_multiply)};
}

void run(Forward a, Method method, bool bfloat16) {
    const Target target = DD_CHOOSE(conv2d_target)(threads_of(a.shape));
    const Kernels kernels = kernels_for(bfloat16);
    a.plan = plan_of(a.shape, choose(a.shape, method, target), target);
    const Plan& plan = a.plan;
    int64_t chunks = plan.method == Method::direct ? 1 : divide_up(a.shape.channels, kChunk);
    int64_t in_parts = plan.input_parts * chunks, out_parts = plan.panels * plan.panel_parts;
    float* packed = Workspace::of(Workspace::input, packed_size(plan));
    int64_t tiles = plan.tiles(a.shape);
    for (int64_t first = 0; first < tiles; first += plan.block) {
        Block block{first, std::min(plan.block, tiles - first)};
        on_threads(in_parts, target, [&](int64_t from, int64_t to) {
            float* scratch = Workspace::of(Workspace::scratch, input_scratch(a.shape, plan));
            kernels.pack(a, block, from, to, packed, scratch);
        });
        on_threads(out_parts, target, [&](int64_t from, int64_t to) {
            float* scratch = Workspace::of(Workspace::scratch, panel_scratch(a.shape, plan, target.lanes).size);
            kernels.multiply(a, block, from, to, packed, scratch);
        });
    }
}

void conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> scale,
            std::optional<Tensor> shift, int64_t activation, std::optional<Tensor> residual, int64_t stride,
            int64_t top, int64_t left, bool turned, int64_t method, bool bfloat16, Tensor y) {
    Forward a{};
    a.shape = shape_of(x, weight, turned, y, stride, top, left);
    check_floats("bias", bias, {a.shape.outputs});
    check_floats("scale", scale, {a.shape.samples, a.shape.channels});
    check_floats("shift", shift, {a.shape.samples, a.shape.channels});
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "conv2d: scale and shift go together");
    constexpr int64_t count = baseline::Activations::kCount;
    STD_TORCH_CHECK(activation >= 0 && activation < count, "conv2d: activation must be in [0, ", count, "); got ",
                    activation);
    if (residual.has_value()) check_image("residual", *residual, y);
    check_apart("x", x, "y", y);
    check_apart("weight", weight, "y", y);
    for (const std::optional<Tensor>& other : {bias, scale, shift, residual}) {
        if (other.has_value()) check_apart("an option", *other, "y", y);
    }
    if (y.numel() == 0) return;
    a.x = operand(x);
    a.scale = data<float>(scale);
    a.shift = data<float>(shift);
    a.activation = activation;
    a.filters = filters_of(weight, turned);
    a.bias = data<float>(bias);
    a.residual = operand(residual);
    a.y = operand(y);
    run(a, method_of(method, a.shape), bfloat16);
}

}  // namespace
}  // namespace dd::conv2d

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("conv2d", TORCH_BOX(&dd::conv2d::conv2d)); }
