// Chooses, at run time, among the instruction sets that each_isa.h compiles for.
#pragma once

#include "common/intrinsics.h"

namespace dd {

// In order: a later set contains the earlier ones, and its vectors are wider.
enum class Isa { baseline, avx2, avx512 };

// Returns the set that DD_KERNELS_CPU_ISA names or, where it names none, the widest of this processor's sets up to
// `widest`. Throws std::runtime_error for a name that is unknown or a set that this processor lacks.
Isa cpu_isa(Isa widest = Isa::avx512);

// Whether this processor multiplies bfloat16 in pairs and adds in float32 (AVX-512 BF16), and AVX-512 is the
// instruction set in force.
bool has_dot_bfloat16();

}  // namespace dd

// DD_CHOOSE is the function of this name for the instruction set in force, up to DD_WIDEST; DD_CHOOSE_UP_TO takes
// another bound, and DD_CHOOSE_FOR the set itself.
#define DD_CHOOSE(function) DD_CHOOSE_UP_TO(::dd::Isa::DD_WIDEST, function)
#define DD_CHOOSE_UP_TO(widest, function) DD_CHOOSE_FOR(::dd::cpu_isa(widest), function)
#ifdef DD_X86
#define DD_CHOOSE_FOR(isa, function)                     \
    ((isa) == ::dd::Isa::avx512 ? ::dd::avx512::function \
     : (isa) == ::dd::Isa::avx2 ? ::dd::avx2::function   \
                                : ::dd::baseline::function)
#else
#define DD_CHOOSE_FOR(isa, function) ((void)(isa), ::dd::baseline::function)
#endif
