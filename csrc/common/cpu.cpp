#include "common/cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef DD_X86
#include <cpuid.h>
#endif

namespace dd {
namespace {

bool has_avx2() {
#ifdef DD_X86
    unsigned a, b, c = 0, d;  // Clang's __builtin_cpu_supports knew no "f16c" before 19
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
#else
    return false;
#endif
}

Isa parse(const char* name) {
    if (std::strcmp(name, "baseline") == 0) return Isa::baseline;
    if (std::strcmp(name, "avx2") != 0) {
        throw std::runtime_error(std::string("DD_KERNELS_CPU_ISA must be baseline or avx2; got '") + name + "'");
    }
    if (!has_avx2()) throw std::runtime_error("DD_KERNELS_CPU_ISA is avx2, but this processor lacks AVX2, FMA or F16C");
    return Isa::avx2;
}

Isa choose() {
    const char* name = std::getenv("DD_KERNELS_CPU_ISA");
    if (name != nullptr && *name != '\0') return parse(name);
    return has_avx2() ? Isa::avx2 : Isa::baseline;
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> isa{choose()};
    return isa;
}

}  // namespace

Isa cpu_isa() { return current().load(std::memory_order_relaxed); }

}  // namespace dd

// For tests and reports, through ctypes: sets the instruction set if `name` is not null; returns the
// one in force, or null if this processor does not have the one named.
extern "C" __attribute__((visibility("default"))) const char* dd_kernels_cpu_isa(const char* name) {
    try {
        if (name != nullptr) dd::current().store(dd::parse(name), std::memory_order_relaxed);
        return dd::cpu_isa() == dd::Isa::avx2 ? "avx2" : "baseline";
    } catch (const std::runtime_error&) {
        return nullptr;
    }
}
