// Which processor this is compiled for, and its intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#define DD_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#define DD_NEON
#include <arm_neon.h>
#endif

#define DD_INLINE inline __attribute__((always_inline))
