#include "conv2d/cpu_bfloat16.h"

#define DD_KERNEL "conv2d/cpu_kernel.h"
#include "common/dot_bfloat16.h"

namespace dd::conv2d {

#ifdef DD_X86
void dot_bfloat16_pack(const Forward& a, const Block& block, int64_t first, int64_t last, float* memory,
                       float* scratch) {
    avx512_bf16::conv2d_pack(a, block, first, last, memory, scratch);
}

void dot_bfloat16_pack_filters(const Forward& a, int64_t first, int64_t last, float* kept, float* scratch) {
    avx512_bf16::conv2d_pack_filters(a, first, last, kept, scratch);
}

void dot_bfloat16_multiply(const Forward& a, const Block& block, int64_t first, int64_t last, const float* memory,
                           float* scratch) {
    avx512_bf16::conv2d_multiply(a, block, first, last, memory, scratch);
}
#else
void dot_bfloat16_pack(const Forward&, const Block&, int64_t, int64_t, float*, float*) {}
void dot_bfloat16_pack_filters(const Forward&, int64_t, int64_t, float*, float*) {}
void dot_bfloat16_multiply(const Forward&, const Block&, int64_t, int64_t, const float*, float*) {}
#endif

}  // namespace dd::conv2d
