// Tells which processor this is compiled for, and declares its intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#define DD_X86
#define DD_AVX2 "avx2,fma,f16c"
#ifdef DD_EMULATE_AVX512  // a test build of the kernels of 16 lanes for processors without AVX-512
#include <avx512_intrinsics.h>
#define DD_AVX512 DD_AVX2
#elif defined(__clang__)
#include <immintrin.h>
#define DD_AVX512 "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq"
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of undefined operands in its own intrinsics
#include <immintrin.h>
#pragma GCC diagnostic pop
// GCC vectorises scalar code in 256 bits at most: in 512, GCC 12 drops the rounding of a double to float and back.
#define DD_AVX512 "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=256"
#endif
#ifdef DD_EMULATE_AVX512
#define DD_AVX512_BF16 DD_AVX512
#else
#define DD_AVX512_BF16 DD_AVX512 ",avx512bf16"
#endif
#elif defined(__aarch64__)
#define DD_NEON
#include <arm_neon.h>
#endif

// Functions between these two are compiled for a processor with the features named.
#define DD_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define DD_BEGIN_TARGET(features) \
    DD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DD_END_TARGET _Pragma("clang attribute pop")
#else
#define DD_BEGIN_TARGET(features) _Pragma("GCC push_options") DD_PRAGMA(GCC target(features))
#define DD_END_TARGET _Pragma("GCC pop_options")
#endif

#define DD_INLINE inline __attribute__((always_inline))
// Inlines a lambda: written after its parameters. The compiler would not, as a loop calls its body in two places: for
// whole vectors and for the last part of one.
#define DD_INLINE_LAMBDA __attribute__((always_inline))
