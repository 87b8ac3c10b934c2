#include "common/cpu.h"
#include "q_sample/binding.h"

#define DD_KERNEL "q_sample/cpu_kernel.h"
#include "common/each_isa.h"

namespace dd {
namespace {

// 512 bits are faster where there is arithmetic: to draw noise and to convert 16-bit floats. What else the op does
// waits for memory, which 256 bits do better.
Isa widest_isa(const QSampleArguments& a) {
    const bool computes = !a.noise || a.noise.has_16_bits() || a.x_start.has_16_bits() || a.x_t.has_16_bits();
    return computes ? Isa::avx512 : Isa::avx2;
}

void run(const QSampleArguments& arguments, const Tensor&) {
    check_rows("q_sample", "t", arguments.t, arguments.layout.samples, arguments.row_count);
    run_tiles(arguments, 3, DD_CHOOSE_UP_TO(widest_isa(arguments), q_sample));
}

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("q_sample", TORCH_BOX(&dd::q_sample_op<dd::run>)); }
