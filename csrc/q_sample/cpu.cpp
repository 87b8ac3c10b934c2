#include "common/cpu.h"
#include "q_sample/binding.h"

#define DD_KERNEL "q_sample/cpu_kernel.h"
#include "common/each_isa.h"

namespace dd {
namespace {

void run(const QSampleArguments& arguments, const Tensor&) {
    check_rows("q_sample", "t", arguments.t, arguments.layout.samples, arguments.row_count);
    run_tiles(arguments, 3, DD_CHOOSE(q_sample));
}

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("q_sample", TORCH_BOX(&dd::q_sample_op<dd::run>)); }
