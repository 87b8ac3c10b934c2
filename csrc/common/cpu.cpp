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

struct Set {
    Isa isa;
    const char* name;
    const char* features;  // what a processor must have
};

constexpr Set kSets[] = {
    {Isa::baseline, "baseline", ""},
    {Isa::avx2, "avx2", "AVX2, FMA and F16C"},
    {Isa::avx512, "avx512", "AVX-512 F, VL, BW and DQ"},
};

#ifdef DD_X86
bool has_avx2() {
    unsigned a, b, c = 0, d;  // Clang's __builtin_cpu_supports knew no "f16c" before 19
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}

bool has_avx512() {
#ifdef DD_EMULATE_AVX512
    return has_avx2();
#else
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
}

Isa widest_here() { return has_avx512() ? Isa::avx512 : has_avx2() ? Isa::avx2 : Isa::baseline; }
#else
Isa widest_here() { return Isa::baseline; }
#endif

// An instruction set: the one that was named, or else the processor's widest, instead of which an op may take a smaller
// one.
struct Choice {
    Isa isa;
    bool named;
};

Choice parse(const char* name) {
    for (const Set& set : kSets) {
        if (std::strcmp(name, set.name) != 0) continue;
        if (set.isa <= widest_here()) return {set.isa, true};
        throw std::runtime_error(std::string("DD_KERNELS_CPU_ISA is ") + name + ", but this processor lacks " +
                                 set.features);
    }
    throw std::runtime_error(std::string("DD_KERNELS_CPU_ISA must be baseline, avx2 or avx512; got '") + name + "'");
}

Choice from_environment() {
    const char* name = std::getenv("DD_KERNELS_CPU_ISA");
    if (name != nullptr && *name != '\0') return parse(name);
    return {widest_here(), false};
}

std::atomic<Choice>& current() {
    static std::atomic<Choice> choice{from_environment()};
    return choice;
}

}  // namespace

Isa cpu_isa(Isa widest) {
    const Choice choice = current().load(std::memory_order_relaxed);
    return choice.named || choice.isa < widest ? choice.isa : widest;
}

bool has_dot_bfloat16() {
#if defined(DD_EMULATE_AVX512)
    return cpu_isa() == Isa::avx512;
#elif defined(DD_X86)
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has && cpu_isa() == Isa::avx512;
#else
    return false;
#endif
}

}  // namespace dd

// For tests and reports, through ctypes. Makes every op use the named instruction set; "" restores what the environment
// says, and null changes nothing. Returns the widest set in use, or null if this processor lacks the one named.
extern "C" __attribute__((visibility("default"))) const char* dd_kernels_cpu_isa(const char* name) {
    try {
        if (name != nullptr) dd::current().store(*name != '\0' ? dd::parse(name) : dd::from_environment());
        return dd::kSets[static_cast<int>(dd::cpu_isa())].name;
    } catch (const std::runtime_error&) {
        return nullptr;
    }
}
