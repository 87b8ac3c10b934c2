// What formula.h of every op is written with, so that one text serves C++ and CUDA.
//
// A formula is a template over its value type: a Vec of some instruction set, or a float on a GPU. It
// stands in namespace dd::DD_ISA and is read once for each, after the functions it calls (fma, clamp,
// sqrt ...), which vec.h, vec_math.h and their CUDA counterpart define under the same names.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DD_HOST_DEVICE inline __attribute__((always_inline))
#endif
