// Defines for one float on a GPU the functions that every formula.h calls; vec.h defines them for a vector on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "common/host_device.h"

#define DD_ISA cuda

namespace dd::cuda {

typedef float Vec;
typedef int32_t VecI;
typedef uint32_t VecU;

// Returns the same bits as another type.
template <class To, class From>
DD_HOST_DEVICE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits_as keeps every bit");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

DD_HOST_DEVICE VecI as_int(Vec v) { return bits_as<VecI>(v); }
DD_HOST_DEVICE VecU as_uint(Vec v) { return bits_as<VecU>(v); }
DD_HOST_DEVICE Vec as_float(VecI v) { return bits_as<Vec>(v); }
DD_HOST_DEVICE Vec as_float(VecU v) { return bits_as<Vec>(v); }
DD_HOST_DEVICE Vec to_float(VecI v) { return static_cast<float>(v); }

DD_HOST_DEVICE Vec select(bool condition, Vec yes, Vec no) { return condition ? yes : no; }

// Clamps as torch.clamp does: NaN stays NaN.
DD_HOST_DEVICE Vec clamp(Vec v, Vec low, Vec high) {
#ifdef __CUDA_ARCH__
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(v), "f"(low));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(v), "f"(high));
    return v;
#else
    v = select(v < low, low, v);
    return select(v > high, high, v);
#endif
}

DD_HOST_DEVICE Vec fma(Vec a, Vec b, Vec c) { return ::fmaf(a, b, c); }

// Within 1 ulp on the device (PTX ISA, sqrt.approx); the correctly rounded form takes three times the instructions.
DD_HOST_DEVICE Vec sqrt(Vec v) {
#ifdef __CUDA_ARCH__
    float result;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
#else
    return ::sqrtf(v);
#endif
}

DD_HOST_DEVICE Vec abs(Vec v) { return ::fabsf(v); }

// Returns -2 (w + 1) 2^-32, in which only the conversion of w to float and the sum are rounded.
DD_HOST_DEVICE Vec minus_two_uniform(VecU w) { return fma(static_cast<float>(w), -0x1p-31f, -0x1p-31f); }

}  // namespace dd::cuda

#include "common/philox.h"
#include "common/vec_math.h"
#include "randn/formula.h"
