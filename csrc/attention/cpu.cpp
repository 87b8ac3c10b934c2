#include "common/cpu.h"
#include "attention/binding.h"
#include "attention/cpu_bfloat16.h"
#include "common/workspace.h"

#define DD_KERNEL "attention/cpu_kernel.h"
#define DD_WIDEST avx512
#include "common/each_isa.h"

namespace dd::attention {
namespace {

// Packed keys and values of the heads that a thread works on at a time: half of an L2 cache, or one head.
constexpr int64_t kPackedFloats = 1 << 17;

// Below a million multiply-adds waking a thread costs more than it gives.
int64_t threads_of(const Shape& shape) {
    const double products = static_cast<double>(shape.all_heads() * shape.queries) *
                            static_cast<double>(shape.keys * (shape.depth + shape.outputs));
    return products < 1e6 ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

void run(const Arguments& a, bool bfloat16) {
    const Plan plan(a.shape, DD_CHOOSE(attention_lanes)());
    const bool dots = bfloat16 && has_dot_bfloat16();
    const auto pack = dots ? dot_bfloat16_pack : DD_CHOOSE(attention_pack);
    const auto attend = dots ? dot_bfloat16_attend : DD_CHOOSE(attention_attend);
    const int64_t threads = threads_of(a.shape), all = a.shape.all_heads();
    const int64_t together = std::min(all, threads * std::max<int64_t>(1, kPackedFloats / plan.head));
    float* packed = Workspace::of(Workspace::input, together * plan.head);
    for (int64_t head = 0; head < all; head += together) {
        const int64_t heads = std::min(together, all - head);
        on_threads(heads * plan.pieces(), threads, [&](int64_t from, int64_t to) { pack(a, head, from, to, packed); });
        on_threads(heads * plan.groups, threads, [&](int64_t from, int64_t to) {
            float* scratch = Workspace::of(Workspace::scratch, Scratch(a.shape, plan).size);
            attend(a, head, from, to, packed, scratch);
        });
    }
}

void attention(Tensor q, Tensor k, Tensor v, double scale, bool bfloat16, Tensor y) {
    const Arguments a = arguments_of(q, k, v, scale, y);
    if (y.numel() > 0) run(a, bfloat16);
}

}  // namespace
}  // namespace dd::attention

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("attention", TORCH_BOX(&dd::attention::attention)); }
