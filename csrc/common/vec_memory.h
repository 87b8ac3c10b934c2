// Loads and stores of the three dtypes, as float32, in which all kernels compute. Included once per instruction set.

#include "common/layout.h"

namespace dd::DD_ISA {

DD_INLINE VecU16 load(const uint16_t* p) {
    VecU16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

DD_INLINE void store(uint16_t* p, VecU16 v) { __builtin_memcpy(p, &v, sizeof v); }

// Loads and stores the first n < kLanes values; a load sets the other lanes to 0.
#if DD_LANES == 16
DD_INLINE VecU16 load_first(const uint16_t* p, int64_t n) {
    return (VecU16)_mm256_maskz_loadu_epi16(first_lanes(n), p);
}
DD_INLINE void store_first(uint16_t* p, int64_t n, VecU16 v) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)v);
}
#else
DD_INLINE VecU16 load_first(const uint16_t* p, int64_t n) {
    VecU16 v{};
    __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof *p);
    return v;
}

DD_INLINE void store_first(uint16_t* p, int64_t n, VecU16 v) {
    __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof *p);
}
#endif

DD_INLINE VecU16 load(const uint16_t* p, int64_t left) {
    return __builtin_expect(left >= kLanes, 1) ? load(p) : load_first(p, left);
}

DD_INLINE void store(uint16_t* p, int64_t left, VecU16 v) {
    if (__builtin_expect(left >= kLanes, 1)) return store(p, v);
    store_first(p, left, v);
}

// These are intrinsics, because GCC 12 compiles __builtin_convertvector to three instructions instead of one, or twice
// as many.
#if DD_LANES == 16
DD_INLINE VecU widened(VecU16 v) { return (VecU)_mm512_cvtepu16_epi32((__m256i)v); }
DD_INLINE VecU16 narrowed(VecU v) { return (VecU16)_mm512_cvtepi32_epi16((__m512i)v); }
#elif DD_LANES == 8
DD_INLINE VecU widened(VecU16 v) { return (VecU)_mm256_cvtepu16_epi32((__m128i)v); }
DD_INLINE VecU16 narrowed(VecU v) {  // of values below 2^16
    __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    return (VecU16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
}
#else
DD_INLINE VecU widened(VecU16 v) { return __builtin_convertvector(v, VecU); }
DD_INLINE VecU16 narrowed(VecU v) { return __builtin_convertvector(v, VecU16); }
#endif

DD_INLINE Vec from_bfloat16(VecU16 v) { return (Vec)(widened(v) << 16); }

// Rounds to nearest even. NaN is replaced by the quiet NaN, since the carry of the rounding could turn it into inf.
DD_INLINE VecU16 to_bfloat16(Vec v) {
    VecU bits = (VecU)v;
    VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return narrowed((v != v) ? splat_u(0x7fc0) : rounded);
}

#if DD_LANES == 16
DD_INLINE Vec from_float16(VecU16 v) { return (Vec)_mm512_cvtph_ps((__m256i)v); }
DD_INLINE VecU16 to_float16(Vec v) { return (VecU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif DD_LANES == 8
DD_INLINE Vec from_float16(VecU16 v) { return (Vec)_mm256_cvtph_ps((__m128i)v); }
DD_INLINE VecU16 to_float16(Vec v) { return (VecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
DD_INLINE Vec from_float16(VecU16 half) {
    VecU h = widened(half);
    VecU exponent = h & 0x7c00u;
    VecU bits = ((h & 0x7fffu) << 13) + (112u << 23);
    bits = (exponent == 0x7c00u) ? bits + (112u << 23) : bits;
    // A subnormal half is m 2^-24 = 2^-14 (1 + m 2^-10) - 2^-14.
    VecU subnormal = (VecU)((Vec)(bits + (1u << 23)) - 0x1p-14f);
    bits = (exponent == 0u) ? subnormal : bits;
    return (Vec)(bits | (h & 0x8000u) << 16);
}

// Rounds to nearest even, as F16C does.
DD_INLINE VecU16 to_float16(Vec v) {
    VecU sign = (VecU)v & 0x80000000u;
    VecU bits = (VecU)v ^ sign;
    VecU normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    // Adding 1/2 leaves m of a subnormal m 2^-24, rounded, in the low bits.
    VecU subnormal = (VecU)((Vec)bits + 0.5f) - 0x3f000000u;
    VecU half = (bits < (113u << 23)) ? subnormal : normal;
    VecU too_large = (bits > 0x7f800000u) ? splat_u(0x7e00) : splat_u(0x7c00);
    half = (bits >= 0x47800000u) ? too_large : half;
    return narrowed(half | sign >> 16);
}
#endif

template <DType dtype>
DD_INLINE void widen(const uint16_t* from, int64_t n, float* to) {
    for_vectors(n, [&](int64_t i, int64_t left) {
        VecU16 v = load(from + i, left);
        store(to + i, left, dtype == DType::bfloat16 ? from_bfloat16(v) : from_float16(v));
    });
}

template <DType dtype>
DD_INLINE void narrow(const float* from, int64_t n, uint16_t* to) {
    for_vectors(n, [&](int64_t i, int64_t left) {
        Vec v = load(from + i, left);
        store(to + i, left, dtype == DType::bfloat16 ? to_bfloat16(v) : to_float16(v));
    });
}

// Reads or writes the vector at an offset, of which `left` elements are there.
DD_INLINE Vec read(const Operand& from, int64_t offset, int64_t left) {
    if (from.dtype == DType::float32) return load(static_cast<const float*>(from.data) + offset, left);
    VecU16 v = load(static_cast<const uint16_t*>(from.data) + offset, left);
    return from.dtype == DType::bfloat16 ? from_bfloat16(v) : from_float16(v);
}

DD_INLINE void write(const Operand& to, int64_t offset, int64_t left, Vec v) {
    if (to.dtype == DType::float32) {
        store(static_cast<float*>(to.data) + offset, left, v);
    } else {
        VecU16 narrow = to.dtype == DType::bfloat16 ? to_bfloat16(v) : to_float16(v);
        store(static_cast<uint16_t*>(to.data) + offset, left, narrow);
    }
}

DD_INLINE void* address(const Operand& operand, const Run& tile) {
    int64_t size = operand.dtype == DType::float32 ? 4 : 2;
    return static_cast<char*>(operand.data) + (tile.sample * operand.sample_stride + tile.offset) * size;
}

// Returns the tile of an operand as floats: in place if the operand is float32, else widened into `buffer`.
DD_INLINE const float* read_tile(const Operand& operand, const Run& tile, float* buffer) {
    void* data = address(operand, tile);
    switch (operand.dtype) {
        case DType::float32:
            return static_cast<const float*>(data);
        case DType::bfloat16:
            widen<DType::bfloat16>(static_cast<const uint16_t*>(data), tile.elements, buffer);
            break;
        case DType::float16:
            widen<DType::float16>(static_cast<const uint16_t*>(data), tile.elements, buffer);
            break;
    }
    return buffer;
}

// Returns where a kernel writes the tile of an output as floats: in place, or `buffer`. write_tile() stores it then.
DD_INLINE float* output_tile(const Operand& operand, const Run& tile, float* buffer) {
    return operand.dtype == DType::float32 ? static_cast<float*>(address(operand, tile)) : buffer;
}

DD_INLINE void write_tile(const Operand& operand, const Run& tile, const float* values) {
    void* data = address(operand, tile);
    switch (operand.dtype) {
        case DType::float32:
            if (data != values) __builtin_memcpy(data, values, static_cast<size_t>(tile.elements) * sizeof(float));
            break;
        case DType::bfloat16:
            narrow<DType::bfloat16>(values, tile.elements, static_cast<uint16_t*>(data));
            break;
        case DType::float16:
            narrow<DType::float16>(values, tile.elements, static_cast<uint16_t*>(data));
            break;
    }
}

}  // namespace dd::DD_ISA
