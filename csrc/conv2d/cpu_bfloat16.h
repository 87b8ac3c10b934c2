// The kernels of processors that multiply bfloat16 in pairs and add in float32 (AVX-512 BF16). To be called where
// has_dot_bfloat16().
#pragma once

#include "conv2d/arguments.h"

namespace dd::conv2d {

void dot_bfloat16_pack(const Forward& a, const Block& block, int64_t first, int64_t last, float* memory,
                       float* scratch);
void dot_bfloat16_pack_filters(const Forward& a, int64_t first, int64_t last, float* kept, float* scratch);
void dot_bfloat16_multiply(const Forward& a, const Block& block, int64_t first, int64_t last, const float* memory,
                           float* scratch);

}  // namespace dd::conv2d
