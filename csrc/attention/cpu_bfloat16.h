// The kernels of processors that multiply bfloat16 in pairs and add in float32 (AVX-512 BF16). To be called where
// has_dot_bfloat16().
#pragma once

#include "attention/arguments.h"

namespace dd::attention {

void dot_bfloat16_pack(const Arguments& a, int64_t head, int64_t first, int64_t last, float* memory);
void dot_bfloat16_attend(const Arguments& a, int64_t head, int64_t first, int64_t last, const float* memory,
                         float* scratch);

}  // namespace dd::attention
