// Lets tests call the functions of csrc/common/vec_math.h in every instruction set, through ctypes.
#include <cstdint>

#include "common/cpu_isa.h"

#define DD_KERNEL "vec_math_kernel.h"
#include "common/each_isa.h"

#define DD_EXPORT extern "C" __attribute__((visibility("default")))

// Evaluates a function at n inputs. `isa` is a dd::Isa.
#define DD_FUNCTION(name, Input)                                            \
    DD_EXPORT void name(int isa, const Input* from, float* to, int64_t n) { \
        DD_CHOOSE_FOR(static_cast<dd::Isa>(isa), name)(from, to, n);        \
    }

DD_FUNCTION(exp_of, float)
DD_FUNCTION(exp2_of, float)
DD_FUNCTION(one_plus_exp_minus_of, float)
DD_FUNCTION(minus_two_log_of, float)
DD_FUNCTION(minus_two_uniform_of, uint32_t)
DD_FUNCTION(sine_of, uint32_t)
DD_FUNCTION(cosine_of, uint32_t)
