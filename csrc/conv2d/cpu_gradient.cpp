#include "common/cpu.h"
#include "conv2d/bindings.h"
#include "conv2d/plan.h"

#define DD_KERNEL "conv2d/cpu_gradient_kernel.h"
#define DD_WIDEST avx512
#include "common/each_isa.h"

namespace dd::conv2d {
namespace {

void run(WeightGradient a, Method method) {
    const Target target = DD_CHOOSE(conv2d_gradient_target)(threads_of(a.shape));
    a.plan = gradient_plan(a.shape, method, target);
    const Plan& plan = a.plan;
    int64_t chunks = divide_up(a.shape.channels, kChunk), out_chunks = divide_up(a.shape.outputs, kChunk);
    float* inputs = Workspace::of(Workspace::input, plan.points * a.input_plane());
    float* gradients = Workspace::of(Workspace::other_input, plan.points * a.output_plane(target.panel()));
    int64_t tiles = plan.tiles(a.shape);
    for (int64_t first = 0; first < tiles; first += plan.block) {
        Block block{first, std::min(plan.block, tiles - first)};
        on_threads((chunks + out_chunks) * plan.input_parts, target.threads, [&](int64_t from, int64_t to) {
            float* scratch = Workspace::of(Workspace::scratch, input_scratch(a.shape, plan));
            DD_CHOOSE(conv2d_gradient_pack)(a, block, from, to, inputs, gradients, scratch);
        });
        on_threads(plan.panels * chunks, target.threads, [&](int64_t from, int64_t to) {
            int64_t size = 9 * target.lanes * target.lanes + plan.points * kChunk * target.panel();
            float* scratch = Workspace::of(Workspace::scratch, size);
            DD_CHOOSE(conv2d_gradient_multiply)(a, block, from, to, inputs, gradients, scratch);
        });
    }
}

void conv2d_weight_gradient(Tensor dy, Tensor x, int64_t top, int64_t left, int64_t method, Tensor dweight) {
    TensorChecks checks("conv2d_weight_gradient", "x", x);
    WeightGradient a{};
    const Shape& shape = a.shape = shape_of(checks, x, dweight, false, dy, 1, top, left);
    if (shape.kernel_height != 3 || shape.kernel_width != 3) checks.fail("dweight", "3 x 3", "another size");
    if (x.numel() == 0 || dy.numel() == 0) checks.fail("x", "not empty, as dy", "an empty one");
    a.x = checks.image("x", x, {shape.samples, shape.channels, shape.height, shape.width});
    a.dy = checks.image("dy", dy, {shape.samples, shape.outputs, shape.out_height, shape.out_width});
    const Operand gradient = checks.written_filters("dweight", dweight, {shape.outputs, shape.channels, 3, 3});
    a.gradient = filters_of(gradient, dweight, false);
    run(a, method_of(checks, method, shape));
}

}  // namespace
}  // namespace dd::conv2d

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) {
    m.impl("conv2d_weight_gradient", TORCH_BOX(&dd::conv2d::conv2d_weight_gradient));
}
