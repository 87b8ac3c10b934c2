#include <cstring>

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
    decltype(&baseline::conv2d_pack_filters) pack_filters;
    decltype(&baseline::conv2d_multiply) multiply;
};

// Products are of bfloat16 where that is asked for and the processor has them, else of float32.
Kernels kernels_for(bool bfloat16) {
    if (bfloat16 && has_dot_bfloat16()) return {dot_bfloat16_pack, dot_bfloat16_pack_filters, dot_bfloat16_multiply};
    return {DD_CHOOSE(conv2d_pack), DD_CHOOSE(conv2d_pack_filters), DD_CHOOSE(conv2d_multiply)};
}

Target target_of(const Shape& shape) { return DD_CHOOSE(conv2d_target)(threads_of(shape)); }

// What stands before kept filters: what they were packed from, and how. Weights may change behind torch's version
// counter (`weight.data`), so that some of them are compared too.
struct KeptHeader {
    static constexpr int64_t samples = 60;
    int32_t method, lanes, bfloat16, turned;
    uint32_t weights[samples];  // their bits, of 16 or 32
};
constexpr int64_t kHeaderFloats = sizeof(KeptHeader) / sizeof(float);

// Beyond, packing the filters in each call takes 3 % of its time and less.
constexpr int64_t kManyTiles = 256, kManyPixels = 640;

// Floats that kept filters take, or 0 where keeping them does not pay.
int64_t kept_size(const Shape& shape, const Plan& plan, const Target& target, bool bfloat16) {
    if (plan.tiles(shape) > (plan.method == Method::direct ? kManyPixels : kManyTiles)) return 0;
    const int64_t packed = plan.panels * panel_size(plan, target.panel());
    return kHeaderFloats + (bfloat16 && has_dot_bfloat16() ? packed / 2 : packed);
}

void pack_all_filters(const Forward& a, const Kernels& kernels, const Target& target, float* to) {
    on_threads(a.plan.panels, target.threads, [&](int64_t first, int64_t last) {
        float* scratch = Workspace::of(Workspace::scratch, panel_scratch(a.shape, a.plan, target.lanes).size);
        kernels.pack_filters(a, first, last, to, scratch);
    });
}

// Packs all filters unless `kept` holds them, and makes the panels read them there.
void keep_filters(Forward& a, const Kernels& kernels, const Target& target, bool bfloat16, float* kept) {
    KeptHeader header{
        static_cast<int32_t>(a.plan.method), static_cast<int32_t>(target.lanes), bfloat16, a.filters.turned, {}};
    const int64_t count = a.shape.outputs * a.shape.channels * a.shape.taps();
    const int64_t size = a.filters.values.has_16_bits() ? 2 : 4;
    for (int64_t i = 0; i < KeptHeader::samples; ++i) {
        const char* weight = static_cast<const char*>(a.filters.values.data) + i * count / KeptHeader::samples * size;
        std::memcpy(&header.weights[i], weight, static_cast<size_t>(size));
    }
    a.kept = kept + kHeaderFloats;
    if (std::memcmp(kept, &header, sizeof header) == 0) return;
    pack_all_filters(a, kernels, target, kept + kHeaderFloats);
    std::memcpy(kept, &header, sizeof header);
}

// Each thread packs and multiplies blocks of its own.
void run_apart(const Forward& a, const Kernels& kernels, const Target& target) {
    const Plan& plan = a.plan;
    on_threads(plan.blocks, target.threads, [&](int64_t from, int64_t to) {
        float* packed = Workspace::of(Workspace::input, packed_size(plan));
        const int64_t panels = panel_scratch(a.shape, plan, target.lanes).size;
        float* scratch = Workspace::of(Workspace::scratch, std::max(input_scratch(a.shape, plan), panels));
        for (int64_t i = from; i < to; ++i) {
            const Block block = block_of(a.shape, plan, i);
            kernels.pack(a, block, 0, packing_parts(a.shape, plan), packed, scratch);
            kernels.multiply(a, block, 0, plan.panels, packed, scratch);
        }
    });
}

// All threads pack a block, then multiply it.
void run_together(const Forward& a, const Kernels& kernels, const Target& target) {
    const Plan& plan = a.plan;
    float* packed = Workspace::of(Workspace::input, packed_size(plan));
    for (int64_t i = 0; i < plan.blocks; ++i) {
        const Block block = block_of(a.shape, plan, i);
        on_threads(packing_parts(a.shape, plan), target.threads, [&](int64_t from, int64_t to) {
            float* scratch = Workspace::of(Workspace::scratch, input_scratch(a.shape, plan));
            kernels.pack(a, block, from, to, packed, scratch);
        });
        on_threads(plan.panels * plan.panel_parts, target.threads, [&](int64_t from, int64_t to) {
            float* scratch = Workspace::of(Workspace::scratch, panel_scratch(a.shape, plan, target.lanes).size);
            kernels.multiply(a, block, from, to, packed, scratch);
        });
    }
}

void run(Forward a, Method method, bool bfloat16, float* kept, int64_t kept_floats) {
    const Target target = target_of(a.shape);
    const Kernels kernels = kernels_for(bfloat16);
    a.plan = plan_of(a.shape, choose(a.shape, method, target), target);
    const Plan& plan = a.plan;
    if (kept != nullptr) {
        const int64_t size = kept_size(a.shape, plan, target, bfloat16);
        STD_TORCH_CHECK(size > 0 && kept_floats == size, "conv2d: kept must have ", size, " elements; got ",
                        kept_floats);
        keep_filters(a, kernels, target, bfloat16 && has_dot_bfloat16(), kept);
    } else if (plan.apart) {
        float* filters = Workspace::of(Workspace::filters, plan.panels * panel_size(plan, target.panel()));
        pack_all_filters(a, kernels, target, filters);
        a.kept = filters;
    }
    if (plan.apart) {
        run_apart(a, kernels, target);
    } else {
        run_together(a, kernels, target);
    }
}

void conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> scale,
            std::optional<Tensor> shift, int64_t activation, std::optional<Tensor> residual, int64_t stride,
            int64_t top, int64_t left, bool turned, int64_t method, bool bfloat16, Tensor y, std::optional<Tensor> kept,
            bool doubled) {
    TensorChecks checks("conv2d", "x", x);
    Forward a{};
    const Shape& shape = a.shape = shape_of(checks, x, weight, turned, y, stride, top, left, doubled);
    constexpr int64_t count = baseline::Activations::kCount;
    if (activation < 0 || activation >= count) {
        checks.fail("activation", "in [0, " + std::to_string(count) + ")", std::to_string(activation));
    }
    if (scale.has_value() != shift.has_value()) checks.fail("scale", "given with shift", "one of both");
    a.x = checks.image("x", x, {shape.samples, shape.channels, x.size(2), x.size(3)});
    const int64_t first = turned ? shape.channels : shape.outputs, second = turned ? shape.outputs : shape.channels;
    const Operand filters = checks.filters("weight", weight, {first, second, shape.kernel_height, shape.kernel_width});
    a.filters = filters_of(filters, weight, turned);
    a.bias = checks.values<float>("bias", bias, {shape.outputs});
    a.scale = checks.values<float>("scale", scale, {shape.samples, shape.channels});
    a.shift = checks.values<float>("shift", shift, {shape.samples, shape.channels});
    a.activation = activation;
    a.residual = checks.image("residual", residual, {shape.samples, shape.outputs, shape.out_height, shape.out_width});
    a.y = checks.written_image("y", y, {shape.samples, shape.outputs, shape.out_height, shape.out_width});
    const int64_t kept_floats = kept.has_value() ? kept->numel() : 0;
    float* kept_filters = checks.written_values<float>("kept", kept, {kept_floats});
    const Method wanted = method_of(checks, method, shape);
    if (y.numel() > 0) run(a, wanted, bfloat16, kept_filters, kept_floats);
}

int64_t conv2d_kept_size(Tensor x, Tensor weight, int64_t stride, int64_t top, int64_t left, bool turned,
                         int64_t method, bool bfloat16, Tensor y) {
    const TensorChecks checks("conv2d_kept_size", "x", x);
    const Shape shape = shape_of(checks, x, weight, turned, y, stride, top, left);
    const Method wanted = method_of(checks, method, shape);
    if (y.numel() == 0) return 0;
    const Target target = target_of(shape);
    return kept_size(shape, plan_of(shape, choose(shape, wanted, target), target), target, bfloat16);
}

}  // namespace
}  // namespace dd::conv2d

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) {
    m.impl("conv2d", TORCH_BOX(&dd::conv2d::conv2d));
    m.impl("conv2d_kept_size", TORCH_BOX(&dd::conv2d::conv2d_kept_size));
}
