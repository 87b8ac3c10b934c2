// Compiles the file DD_KERNEL once for each instruction set, in a namespace of that name.
//
//     struct Arguments { ... };                  // what does not depend on the instruction set
//     #define DD_KERNEL "randn/cpu_kernel.h"     // written in the types of vec.h, in namespace dd::DD_ISA
//     #include "common/each_isa.h"
//     ... DD_CHOOSE(randn)(arguments) ...        // dd::avx2::randn or dd::baseline::randn
//
// The library runs on processors its builder never saw, so code beyond the architecture's baseline
// must be reached only by functions chosen at run time. The target pragma changes every function
// below it, which is why kernels, and the headers they share, call nothing of the standard library:
// an inline std:: function compiled with AVX2 could be the copy that the linker keeps for everyone.
// Headers named here have no include guard: they are read once per instruction set.

#include "common/cpu_isa.h"
#include "common/intrinsics.h"

#define DD_ISA baseline
#define DD_LANES 4
#include "common/vec.h"
#include "common/vec_math.h"
#include "common/vec_memory.h"
#include DD_KERNEL
#undef DD_ISA
#undef DD_LANES

#ifdef DD_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define DD_ISA avx2
#define DD_LANES 8
#include "common/vec.h"
#include "common/vec_math.h"
#include "common/vec_memory.h"
#include DD_KERNEL
#undef DD_ISA
#undef DD_LANES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
