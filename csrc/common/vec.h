// Defines Vec, a vector of DD_LANES floats, by the vector extensions of GCC and Clang. With them the compiler provides
// the operators (+ - * / < ?:), broadcasts scalar operands, and keeps the bits in a cast between types of one size.
// Intrinsics are used only for what these extensions lack. Included once per instruction set.
//
// The build disables FMA contraction (-ffp-contract=off); fma() is called where one rounding is wanted, so that two
// loops over the same formula give the same bits.

namespace dd::DD_ISA {

constexpr int kLanes = DD_LANES;

typedef float Vec __attribute__((vector_size(4 * DD_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * DD_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * DD_LANES)));
typedef uint64_t VecU64 __attribute__((vector_size(4 * DD_LANES)));  // half as many lanes
typedef uint16_t VecU16 __attribute__((vector_size(2 * DD_LANES)));

// Returns the same bits as another type.
DD_INLINE VecI as_int(Vec v) { return (VecI)v; }
DD_INLINE VecU as_uint(Vec v) { return (VecU)v; }
DD_INLINE Vec as_float(VecI v) { return (Vec)v; }
DD_INLINE Vec as_float(VecU v) { return (Vec)v; }

DD_INLINE Vec splat(float v) { return v - Vec{}; }  // -0 - 0 is -0, where -0 + 0 would not be
DD_INLINE VecU splat_u(uint32_t v) { return v - VecU{}; }

DD_INLINE Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

DD_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// Loads, stores or keeps the first n < kLanes floats; load_first and keep_first set the other lanes to 0.
#if DD_LANES == 16
DD_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
DD_INLINE Vec load_first(const float* p, int64_t n) { return (Vec)_mm512_maskz_loadu_ps(first_lanes(n), p); }
DD_INLINE void store_first(float* p, int64_t n, Vec v) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
DD_INLINE Vec keep_first(Vec v, int64_t n) { return (Vec)_mm512_maskz_mov_ps(first_lanes(n), (__m512)v); }
#elif DD_LANES == 8
DD_INLINE VecI first_lanes(int64_t n) { return VecI{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(n); }
DD_INLINE Vec load_first(const float* p, int64_t n) { return (Vec)_mm256_maskload_ps(p, (__m256i)first_lanes(n)); }
DD_INLINE void store_first(float* p, int64_t n, Vec v) { _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v); }
DD_INLINE Vec keep_first(Vec v, int64_t n) { return (Vec)((VecI)v & first_lanes(n)); }
#else
DD_INLINE Vec load_first(const float* p, int64_t n) {
    Vec v{};
    __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
    return v;
}

DD_INLINE void store_first(float* p, int64_t n, Vec v) {
    __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}

DD_INLINE Vec keep_first(Vec v, int64_t n) {
    Vec kept{};
    __builtin_memcpy(&kept, &v, static_cast<size_t>(n) * sizeof(float));
    return kept;
}
#endif

// Loads or stores in a loop over an array of which `left` floats remain: a whole vector, or the last part of one.
DD_INLINE Vec load(const float* p, int64_t left) {
    return __builtin_expect(left >= kLanes, 1) ? load(p) : load_first(p, left);
}

DD_INLINE void store(float* p, int64_t left, Vec v) {
    if (__builtin_expect(left >= kLanes, 1)) return store(p, v);
    store_first(p, left, v);
}

// Calls body(i, left) for every vector of an array of n floats; `left` is the constant kLanes except in the last call.
template <class Body>
DD_INLINE void for_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, int64_t{kLanes});
    if (i < n) body(i, n - i);
}

DD_INLINE Vec select(VecI condition, Vec yes, Vec no) { return condition ? yes : no; }

// Clamps as torch.clamp does: NaN stays NaN. (x86's min and max return their second operand if one is NaN.)
template <class B>
DD_INLINE Vec clamp(Vec v, B low, B high) {
#if DD_LANES == 16
    return (Vec)_mm512_min_ps((__m512)(high - Vec{}), _mm512_max_ps((__m512)(low - Vec{}), (__m512)v));
#elif DD_LANES == 8
    return (Vec)_mm256_min_ps((__m256)(high - Vec{}), _mm256_max_ps((__m256)(low - Vec{}), (__m256)v));
#elif defined(DD_X86)
    return (Vec)_mm_min_ps((__m128)(high - Vec{}), _mm_max_ps((__m128)(low - Vec{}), (__m128)v));
#else
    v = select(v < low, low - Vec{}, v);
    return select(v > high, high - Vec{}, v);
#endif
}

// Returns the larger one; b where one of them is NaN.
DD_INLINE Vec maximum(Vec a, Vec b) {
#if DD_LANES == 16
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif DD_LANES == 8
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(DD_X86)
    return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
    return select(a > b, a, b);
#endif
}

// Returns a * b + c, rounded once where the instruction set can (all but x86's baseline), else twice.
DD_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if DD_LANES == 16
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DD_LANES == 8
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(DD_NEON)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
DD_INLINE Vec fma(Vec a, float b, Vec c) { return fma(a, splat(b), c); }
DD_INLINE Vec fma(float a, Vec b, Vec c) { return fma(splat(a), b, c); }
DD_INLINE Vec fma(Vec a, Vec b, float c) { return fma(a, b, splat(c)); }
DD_INLINE Vec fma(Vec a, float b, float c) { return fma(a, splat(b), splat(c)); }

DD_INLINE Vec sqrt(Vec v) {
#if DD_LANES == 16
    return (Vec)_mm512_sqrt_ps((__m512)v);
#elif DD_LANES == 8
    return (Vec)_mm256_sqrt_ps((__m256)v);
#elif defined(DD_X86)
    return (Vec)_mm_sqrt_ps((__m128)v);
#elif defined(DD_NEON)
    return (Vec)vsqrtq_f32((float32x4_t)v);
#else
    for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

DD_INLINE Vec abs(Vec v) { return (Vec)((VecU)v & 0x7fffffffu); }

DD_INLINE Vec to_float(VecI v) { return __builtin_convertvector(v, Vec); }

// Returns -2 (w + 1) 2^-32, in which w is rounded to float, and then the sum. The halves of w become the last bits of
// two floats, -2^8 - high 2^-15 and -2^-8 - low 2^-31, of which only the sum is rounded. Largest error: 1 ulp.
DD_INLINE Vec minus_two_uniform(VecU w) {
    Vec high = as_float((w >> 16) | 0xc3800000u);
    Vec low = as_float((w & 0xffffu) | 0xbb800000u);
    return (high + (0x1p8f + 0x1p-8f)) + low - 0x1p-31f;
}

#ifdef __clang__
#define DD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

// Returns the sum of the lanes in a fixed order: the upper half is added to the lower half until one lane is left.
DD_INLINE float sum(Vec v) {
#if DD_LANES == 16
    v += DD_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
    v += DD_SHUFFLE(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
    v += DD_SHUFFLE(v, v, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);
#elif DD_LANES == 8
    v += DD_SHUFFLE(v, v, 4, 5, 6, 7, 4, 5, 6, 7);
    v += DD_SHUFFLE(v, v, 2, 3, 2, 3, 2, 3, 2, 3);
#else
    v += DD_SHUFFLE(v, v, 2, 3, 2, 3);
#endif
    return v[0] + v[1];
}

// The words of Philox are the low halves of 64-bit lanes, where the processor's widening multiplication reads them. The
// high halves may hold anything.
DD_INLINE VecU64 wide_product(VecU64 a, uint32_t b) {
#if DD_LANES == 16
    return (VecU64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif DD_LANES == 8
    return (VecU64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(DD_X86)
    return (VecU64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(DD_NEON)
    return (VecU64)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
    return (a & 0xffffffffu) * b;
#endif
}
DD_INLINE VecU64 high_word(VecU64 product) { return product >> 32; }
DD_INLINE VecU64 low_word(VecU64 product) { return product; }

// Returns the words of a in the even lanes and those of b in the odd ones.
DD_INLINE VecU interleave(VecU64 a, VecU64 b) {
#if DD_LANES == 16
    return (VecU)_mm512_mask_blend_epi32(0xaaaa, (__m512i)a, (__m512i)(b << 32));
#elif DD_LANES == 8
    return (VecU)_mm256_blend_epi32((__m256i)a, (__m256i)(b << 32), 0xaa);
#else
    return (VecU)((a & 0xffffffffu) | (b << 32));
#endif
}

// Interleaves the lanes of a and b within each 128 bits: `lower` has those of the low 64 bits, `upper` those of the
// high.
DD_INLINE void zip(Vec a, Vec b, Vec& lower, Vec& upper) {
#if DD_LANES == 16
    lower = DD_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    upper = DD_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif DD_LANES == 8
    lower = DD_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    upper = DD_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
    lower = DD_SHUFFLE(a, b, 0, 4, 1, 5);
    upper = DD_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

#undef DD_SHUFFLE

}  // namespace dd::DD_ISA
