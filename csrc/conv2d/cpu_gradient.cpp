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
        on_threads((chunks + out_chunks) * plan.input_parts, target, [&](int64_t from, int64_t to) {
            float* scratch = Workspace::of(Workspace::scratch, input_scratch(a.shape, plan));
            DD_CHOOSE(conv2d_gradient_pack)(a, block, from, to, inputs, gradients, scratch);
        });
        on_threads(plan.panels * chunks, target, [&](int64_t from, int64_t to) {
            int64_t size = 9 * target.lanes * target.lanes + plan.points * kChunk * target.panel();
            float* scratch = Workspace::of(Workspace::scratch, size);
            DD_CHOOSE(conv2d_gradient_multiply)(a, block, from, to, inputs, gradients, scratch);
        });
    }
}

void conv2d_weight_gradient(Tensor dy, Tensor x, int64_t top, int64_t left, int64_t method, Tensor dweight) {
    WeightGradient a{};
    a.shape = shape_of(x, dweight, false, dy, 1, top, left);
    STD_TORCH_CHECK(a.shape.kernel_height == 3 && a.shape.kernel_width == 3,
                    "conv2d_weight_gradient: the filters must be 3 x 3");
    STD_TORCH_CHECK(x.numel() > 0 && dy.numel() > 0, "conv2d_weight_gradient: x and dy must not be empty");
    check_apart("x", x, "dweight", dweight);
    check_apart("dy", dy, "dweight", dweight);
    a.x = operand(x);
    a.dy = operand(dy);
    a.gradient = filters_of(dweight, false);
    run(a, method_of(method, a.shape));
}

}  // namespace
}  // namespace dd::conv2d

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) {
    m.impl("conv2d_weight_gradient", TORCH_BOX(&dd::conv2d::conv2d_weight_gradient));
}
