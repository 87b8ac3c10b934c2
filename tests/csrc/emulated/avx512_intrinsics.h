// AVX-512's intrinsics, as far as csrc/ uses them, in terms of AVX2: a processor without AVX-512 then runs the kernels
// of 16 lanes. The compiler lowers the arithmetic on whole vectors itself.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

typedef uint16_t Words __attribute__((vector_size(32)));
typedef uint32_t Ints __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

#define EMULATED inline __attribute__((always_inline))

template <class Vector, class Half>
EMULATED Vector of_halves(Half low, Half high) {
    Vector v;
    std::memcpy(&v, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&v) + sizeof low, &high, sizeof high);
    return v;
}

template <class Half, class Vector>
EMULATED Half half(const Vector& v, int which) {
    Half result;
    std::memcpy(&result, reinterpret_cast<const char*>(&v) + which * sizeof result, sizeof result);
    return result;
}

// Loads, stores and copies of the lanes whose bit is set; the others are 0, and their memory is left alone.
template <class Vector, class Element>
EMULATED Vector load(__mmask16 mask, const void* p) {
    Element lanes[16] = {};
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const Element*>(p) + i, sizeof(Element));
    }
    Vector v;
    std::memcpy(&v, lanes, sizeof v);
    return v;
}

template <class Element, class Vector>
EMULATED void store(void* p, __mmask16 mask, const Vector& v) {
    Element lanes[16];
    std::memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) std::memcpy(static_cast<Element*>(p) + i, lanes + i, sizeof(Element));
    }
}

EMULATED Floats keep(__mmask16 mask, Floats v) { return load<Floats, float>(mask, &v); }

EMULATED Ints blend(__mmask16 mask, Ints a, Ints b) {
    for (int i = 0; i < 16; ++i) a[i] = mask >> i & 1 ? b[i] : a[i];
    return a;
}

// Return the second operand where one is NaN, as the processor does.
EMULATED Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
EMULATED Floats larger(Floats a, Floats b) { return a > b ? a : b; }

EMULATED Floats fma(Floats a, Floats b, Floats c) {
    __m256 halves[2];
    for (int i = 0; i < 2; ++i) halves[i] = _mm256_fmadd_ps(half<__m256>(a, i), half<__m256>(b, i), half<__m256>(c, i));
    return of_halves<Floats>(halves[0], halves[1]);
}

EMULATED Floats root(Floats v) {
    return of_halves<Floats>(_mm256_sqrt_ps(half<__m256>(v, 0)), _mm256_sqrt_ps(half<__m256>(v, 1)));
}

EMULATED Longs product(Longs a, Longs b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
EMULATED Longs splat(int64_t value) { return static_cast<uint64_t>(value) - Longs{}; }

EMULATED Ints widened(Words v) { return __builtin_convertvector(v, Ints); }
EMULATED Words narrowed(Ints v) { return __builtin_convertvector(v, Words); }

EMULATED Floats from_float16(__m256i v) {
    return of_halves<Floats>(_mm256_cvtph_ps(half<__m128i>(v, 0)), _mm256_cvtph_ps(half<__m128i>(v, 1)));
}

EMULATED __m256i to_float16(Floats v, int) {
    __m128i halves[2];
    for (int i = 0; i < 2; ++i) halves[i] = _mm256_cvtps_ph(half<__m256>(v, i), _MM_FROUND_TO_NEAREST_INT);
    return of_halves<__m256i>(halves[0], halves[1]);
}

}  // namespace emulated

#define _mm512_maskz_loadu_ps(mask, p) (__m512)::emulated::load<::emulated::Floats, float>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) ::emulated::store<float>(p, mask, v)
#define _mm512_maskz_mov_ps(mask, v) (__m512)::emulated::keep(mask, (::emulated::Floats)(v))
#define _mm512_mask_blend_epi32(mask, a, b) \
    (__m512i)::emulated::blend(mask, (::emulated::Ints)(a), (::emulated::Ints)(b))
#define _mm512_min_ps(a, b) (__m512)::emulated::smaller((::emulated::Floats)(a), (::emulated::Floats)(b))
#define _mm512_max_ps(a, b) (__m512)::emulated::larger((::emulated::Floats)(a), (::emulated::Floats)(b))
#define _mm512_fmadd_ps(a, b, c) \
    (__m512)::emulated::fma((::emulated::Floats)(a), (::emulated::Floats)(b), (::emulated::Floats)(c))
#define _mm512_sqrt_ps(v) (__m512)::emulated::root((::emulated::Floats)(v))
#define _mm512_mul_epu32(a, b) (__m512i)::emulated::product((::emulated::Longs)(a), (::emulated::Longs)(b))
#define _mm512_set1_epi64(value) (__m512i)::emulated::splat(value)
#define _mm512_cvtepu16_epi32(v) (__m512i)::emulated::widened((::emulated::Words)(v))
#define _mm512_cvtepi32_epi16(v) (__m256i)::emulated::narrowed((::emulated::Ints)(v))
#define _mm512_cvtph_ps(v) (__m512)::emulated::from_float16(v)
#define _mm512_cvtps_ph(v, rounding) ::emulated::to_float16((::emulated::Floats)(v), rounding)
#define _mm256_maskz_loadu_epi16(mask, p) (__m256i)::emulated::load<::emulated::Words, uint16_t>(mask, p)
#define _mm256_mask_storeu_epi16(p, mask, v) ::emulated::store<uint16_t>(p, mask, v)
