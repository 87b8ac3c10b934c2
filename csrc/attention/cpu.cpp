#include "common/cpu.h"
#include "attention/binding.h"
#include "attention/cpu_bfloat16.h"
#include "common/workspace.h"

#define DD_KERNEL "attention/cpu_kernel.h"
#define DD_WIDEST avx512
#include "common/each_isa.h"

namespace dd::attention {
namespace {

int64_t threads_of(const Shape& shape) {
    return threads_for(static_cast<double>(shape.all_heads() * shape.queries) *
                       static_cast<double>(shape.keys * (shape.depth + shape.outputs)));
}

// The kernels of one instruction set.
struct Kernels {
    decltype(&baseline::attention_pack) pack;
    decltype(&baseline::attention_attend) attend;
};

// Products are of bfloat16 where that is asked for and the processor has them, else of float32.
Kernels kernels_for(bool bfloat16) {
    if (bfloat16 && has_dot_bfloat16()) return {dot_bfloat16_pack, dot_bfloat16_attend};
    return {DD_CHOOSE(attention_pack), DD_CHOOSE(attention_attend)};
}

float* scratch_of(const Arguments& a, const Plan& plan) {
    return Workspace::of(Workspace::scratch, Scratch(a.shape, plan).size);
}

// Each thread packs and computes heads of its own.
void run_apart(const Arguments& a, const Plan& plan, const Kernels& kernels, int64_t threads) {
    on_threads(a.shape.all_heads(), threads, [&](int64_t from, int64_t to) {
        float *packed = Workspace::of(Workspace::input, plan.head), *scratch = scratch_of(a, plan);
        for (int64_t head = from; head < to; ++head) {
            kernels.pack(a, head, 0, plan.pieces(), packed);
            kernels.attend(a, head, 0, plan.groups, packed, scratch);
        }
    });
}

// All threads pack a head, then compute it.
void run_together(const Arguments& a, const Plan& plan, const Kernels& kernels, int64_t threads) {
    float* packed = Workspace::of(Workspace::input, plan.head);
    for (int64_t head = 0; head < a.shape.all_heads(); ++head) {
        on_threads(plan.pieces(), threads, [&](int64_t from, int64_t to) { kernels.pack(a, head, from, to, packed); });
        on_threads(plan.groups, threads,
                   [&](int64_t from, int64_t to) { kernels.attend(a, head, from, to, packed, scratch_of(a, plan)); });
    }
}

void run(const Arguments& a, bool bfloat16) {
    const Plan plan(a.shape, DD_CHOOSE(attention_lanes)());
    const int64_t threads = threads_of(a.shape), heads = a.shape.all_heads();
    if (heads % threads == 0 || heads >= 4 * threads) {
        run_apart(a, plan, kernels_for(bfloat16), threads);
    } else {
        run_together(a, plan, kernels_for(bfloat16), threads);
    }
}

void attention(Tensor q, Tensor k, Tensor v, double scale, bool bfloat16, Tensor y) {
    const Arguments a = arguments_of(q, k, v, scale, y);
    if (y.numel() > 0) run(a, bfloat16);
}

}  // namespace
}  // namespace dd::attention

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("attention", TORCH_BOX(&dd::attention::attention)); }
