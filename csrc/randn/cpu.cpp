#include "common/cpu.h"
#include "randn/binding.h"

#define DD_KERNEL "randn/cpu_kernel.h"
#define DD_WIDEST avx512
#include "common/each_isa.h"

namespace dd {
namespace {

void run(const RandnArguments& arguments, const Tensor&) { run_tiles(arguments, 2, DD_CHOOSE(randn)); }

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("randn", TORCH_BOX(&dd::randn_op<dd::run>)); }
