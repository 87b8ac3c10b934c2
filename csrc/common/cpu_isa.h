// Which of the instruction sets that each_isa.h compiles for is run.
#pragma once

#include "common/intrinsics.h"

namespace dd {

enum class Isa { baseline, avx2 };

// The best this processor has, or the one named by DD_KERNELS_CPU_ISA. Throws std::runtime_error for
// a name that is unknown or that this processor cannot run.
Isa cpu_isa();

}  // namespace dd

#ifdef DD_X86
#define DD_CHOOSE(function) (::dd::cpu_isa() == ::dd::Isa::avx2 ? ::dd::avx2::function : ::dd::baseline::function)
#else
#define DD_CHOOSE(function) (::dd::cpu_isa(), ::dd::baseline::function)
#endif
