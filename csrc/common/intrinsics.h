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
// After a lambda's parameters: a loop's body, which is called for whole vectors and again for the last part of one.
#define DD_INLINE_LAMBDA __attribute__((always_inline))
