#include "common/cpu.h"

namespace dd {

struct RandnArguments {
    Layout layout;
    Operand z;
    NoiseKey key;
    uint32_t stream;
};

}  // namespace dd

#define DD_KERNEL "randn/cpu_kernel.h"
#include "common/each_isa.h"

namespace dd {
namespace {

void randn(Tensor z, Tensor key, int64_t stream) {
    RandnArguments a{layout_of(z), operand(z), noise_key(key), static_cast<uint32_t>(stream)};
    run_tiles(a, 2, DD_CHOOSE(randn));
}

}  // namespace
}  // namespace dd

STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CPU, m) { m.impl("randn", TORCH_BOX(&dd::randn)); }
