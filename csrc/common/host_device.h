// Lets the formula.h of every op compile as C++ and as CUDA.
//
// A formula is a template over its value type: a Vec of some instruction set, or a float on a GPU. It is in namespace
// dd::DD_ISA and is included once for each instruction set, after the functions that it calls (fma, clamp, sqrt ...).
// vec.h and vec_math.h define these for the CPU, cuda_math.cuh for CUDA, under the same names.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DD_HOST_DEVICE inline __attribute__((always_inline))
#endif
