// Compiles the file DD_KERNEL in namespace dd::avx512_bf16 for processors that multiply bfloat16 in pairs (AVX-512
// BF16): its packed elements are bfloat16, see packed.h. What is compiled may be called where has_dot_bfloat16().

#include "common/intrinsics.h"

#ifdef DD_X86
#define DD_DOT_BFLOAT16

DD_BEGIN_TARGET(DD_AVX512_BF16)
#define DD_ISA avx512_bf16
#define DD_LANES 16
#include "common/kernel_for_isa.h"
DD_END_TARGET
#endif
