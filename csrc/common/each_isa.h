// Compiles the file DD_KERNEL once for each instruction set, in a namespace of that name.
//
//     struct Arguments { ... };                  // what does not depend on the instruction set
//     #define DD_KERNEL "randn/cpu_kernel.h"     // written in the types of vec.h, in namespace dd::DD_ISA
//     #define DD_WIDEST avx512                   // optional, see below
//     #include "common/each_isa.h"
//     ... DD_CHOOSE(randn)(arguments) ...        // dd::avx512::randn, dd::avx2::randn or dd::baseline::randn
//
// DD_WIDEST is the widest set that DD_CHOOSE takes unless DD_KERNELS_CPU_ISA names one. It is avx2 where it
// is not defined: define it as avx512 where a measurement shows that 512-bit vectors are faster.
//
// The library runs on processors its builder never saw, so code beyond the architecture's baseline
// must be reached only by functions chosen at run time. The target pragma changes every function
// below it, which is why kernels, and the headers they share, call nothing of the standard library:
// an inline std:: function compiled with AVX2 could be the copy that the linker keeps for everyone.
// Headers named here and in kernel_for_isa.h have no include guard: they are read once per instruction set.

#include "common/cpu_isa.h"
#include "common/intrinsics.h"

#ifndef DD_WIDEST
#define DD_WIDEST avx2
#endif

#define DD_ISA baseline
#define DD_LANES 4
#include "common/kernel_for_isa.h"
#undef DD_ISA
#undef DD_LANES

#ifdef DD_X86
DD_BEGIN_TARGET(DD_AVX2)
#define DD_ISA avx2
#define DD_LANES 8
#include "common/kernel_for_isa.h"
#undef DD_ISA
#undef DD_LANES
DD_END_TARGET

DD_BEGIN_TARGET(DD_AVX512)
#define DD_ISA avx512
#define DD_LANES 16
#include "common/kernel_for_isa.h"
#undef DD_ISA
#undef DD_LANES
DD_END_TARGET
#endif
