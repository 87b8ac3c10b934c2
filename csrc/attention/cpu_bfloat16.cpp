#include "attention/cpu_bfloat16.h"

#define DD_KERNEL "attention/cpu_kernel.h"
#include "common/dot_bfloat16.h"

namespace dd::attention {

#ifdef DD_X86
void dot_bfloat16_pack(const Arguments& a, int64_t head, int64_t first, int64_t last, float* memory) {
    avx512_bf16::attention_pack(a, head, first, last, memory);
}

void dot_bfloat16_attend(const Arguments& a, int64_t head, int64_t first, int64_t last, const float* memory,
                         float* scratch) {
    avx512_bf16::attention_attend(a, head, first, last, memory, scratch);
}
#else
void dot_bfloat16_pack(const Arguments&, int64_t, int64_t, int64_t, float*) {}
void dot_bfloat16_attend(const Arguments&, int64_t, int64_t, int64_t, const float*, float*) {}
#endif

}  // namespace dd::attention
