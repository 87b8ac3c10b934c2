#include "common/cpu.h"
#include "reverse_step/binding.h"

#define DD_KERNEL "reverse_step/cpu_kernel.h"
#include "common/each_isa.h"

namespace dd {
namespace {

// 512 bits are faster where there is arithmetic: to draw noise, to convert 16-bit floats and for the exponential of a
// learned variance. What else the op does waits for memory, which 256 bits do better.
Isa widest_isa(const ReverseStepArguments& a) {
    const bool converts = a.x.has_16_bits() || a.out.has_16_bits() || a.noise.has_16_bits() || a.x_prev.has_16_bits() ||
                          a.even.has_16_bits();
    return a.key != nullptr || a.variance || converts ? Isa::avx512 : Isa::avx2;
}

void run(const ReverseStepArguments& arguments, const Tensor&) {
    check_rows("reverse_step", "step", arguments.step, arguments.layout.samples, arguments.row_count);
    run_tiles(arguments, arguments.even ? 9 : 6, DD_CHOOSE_UP_TO(widest_isa(arguments), reverse_step));
}

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("reverse_step", TORCH_BOX(&dd::reverse_step_op<dd::run>)); }
