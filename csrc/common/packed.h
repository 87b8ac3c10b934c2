// The elements of packed matrices and what the micro-kernel does with them: float32, or pairs of bfloat16 along the
// depth where DD_DOT_BFLOAT16 is defined, for processors that multiply these and add both products in float32.

namespace dd::DD_ISA {

constexpr int kPanel = 2 * kLanes;

#ifdef DD_DOT_BFLOAT16
typedef uint16_t Packed;
typedef VecU Factor;
constexpr int kStep = 2;  // of the depth
constexpr bool kPackedFloat32 = false;

DD_INLINE Factor load_factor(const uint16_t* p) {
    Factor v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

DD_INLINE Factor splat_factor(const uint16_t* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return splat_u(pair);
}

#ifdef DD_EMULATE_AVX512
DD_INLINE Vec multiply_add(Factor a, Factor b, Vec c) {
    Vec first = as_float(a << 16) * as_float(b << 16), second = as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
    return c + first + second;
}
DD_INLINE VecU16 rounded(Vec v) { return to_bfloat16(v); }
#else
DD_INLINE Vec multiply_add(Factor a, Factor b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
DD_INLINE VecU16 rounded(Vec v) { return (VecU16)_mm512_cvtneps_pbh((__m512)v); }
#endif

// Packs a vector of the depth of one row.
DD_INLINE void put_row(uint16_t* to, Vec v) { store(to, rounded(v)); }

// Packs a vector of columns of a panel, or of a wider matrix: half of each pair of the depth, the other half stays.
DD_INLINE void put_columns(uint16_t* panel, int64_t depth, int64_t column, Vec v, int64_t width = kPanel) {
    uint16_t* to = panel + depth / 2 * 2 * width + 2 * column;
    VecU bits = widened(rounded(v)), before = load_factor(to);
    bits = depth % 2 == 0 ? (before & 0xffff0000u) | bits : (before & 0xffffu) | bits << 16;
    __builtin_memcpy(to, &bits, sizeof bits);
}

// Packs a vector of columns of each of two steps of the depth, the first of which is even.
DD_INLINE void put_two_columns(uint16_t* panel, int64_t depth, int64_t column, Vec first, Vec second) {
    const VecU bits = widened(rounded(first)) | widened(rounded(second)) << 16;
    __builtin_memcpy(panel + depth * kPanel + 2 * column, &bits, sizeof bits);
}
#else
typedef float Packed;
typedef Vec Factor;
constexpr int kStep = 1;
constexpr bool kPackedFloat32 = true;

DD_INLINE Factor load_factor(const float* p) { return load(p); }
DD_INLINE Factor splat_factor(const float* p) { return splat(*p); }
DD_INLINE Vec multiply_add(Factor a, Factor b, Vec c) { return fma(a, b, c); }
DD_INLINE void put_row(float* to, Vec v) { store(to, v); }
DD_INLINE void put_columns(float* panel, int64_t depth, int64_t column, Vec v, int64_t width = kPanel) {
    store(panel + depth * width + column, v);
}
DD_INLINE void put_two_columns(float* panel, int64_t depth, int64_t column, Vec first, Vec second) {
    store(panel + depth * kPanel + column, first);
    store(panel + (depth + 1) * kPanel + column, second);
}
#endif

// result = 2^v, for what is packed next. Of bfloat16 the largest relative error is 7.5e-5, of a minimax polynomial of
// v - floor(v).
#if defined(DD_DOT_BFLOAT16) && !defined(DD_EMULATE_AVX512)
template <int n>
DD_INLINE void packed_exp2(const Vec (&v)[n], Vec (&result)[n]) {
    Vec f[n], p[n];
    for (int i = 0; i < n; ++i) f[i] = (Vec)_mm512_reduce_ps((__m512)v[i], _MM_FROUND_TO_NEG_INF);
    for (int i = 0; i < n; ++i) p[i] = fma(f[i], 7.8024520e-2f, 2.2606716e-1f);
    for (int i = 0; i < n; ++i) p[i] = fma(p[i], f[i], 6.9583354e-1f);
    for (int i = 0; i < n; ++i) p[i] = fma(p[i], f[i], 9.9992522e-1f);
    for (int i = 0; i < n; ++i) result[i] = (Vec)_mm512_scalef_ps((__m512)p[i], (__m512)v[i]);
}
#else
template <int n>
DD_INLINE void packed_exp2(const Vec (&v)[n], Vec (&result)[n]) {
    exp2(v, result);
}
#endif

}  // namespace dd::DD_ISA
