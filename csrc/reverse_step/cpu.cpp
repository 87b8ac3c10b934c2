#include "common/cpu.h"
#include "reverse_step/binding.h"

#define DD_KERNEL "reverse_step/cpu_kernel.h"
#include "common/each_isa.h"

namespace dd {
namespace {

void run(const ReverseStepArguments& arguments, const Tensor&) {
    check_rows("reverse_step", "step", arguments.step, arguments.layout.samples, arguments.row_count);
    run_tiles(arguments, 6, DD_CHOOSE(reverse_step));
}

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("reverse_step", TORCH_BOX(&dd::reverse_step_op<dd::run>)); }
