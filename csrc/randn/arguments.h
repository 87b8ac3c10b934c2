// What a call of randn carries, on the CPU and on CUDA.
#pragma once

#include "common/layout.h"

namespace dd {

struct RandnArguments {
    Layout layout;
    Operand z;
    const int64_t* key;  // [3], see load_key()
    uint32_t stream;
};

}  // namespace dd
