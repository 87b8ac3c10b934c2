// Transposes squares of vectors, and rows in memory. Included once per instruction set.

namespace dd::DD_ISA {

template <int... j>
struct Lanes {
    // Exchanges, in blocks of `width` lanes, the upper half of `a` with the lower half of `b`.
    template <int width>
    DD_INLINE static void exchange(Vec& a, Vec& b) {
#ifdef __clang__
        Vec lower = __builtin_shufflevector(a, b, ((j & width) ? kLanes + j - width : j)...);
        b = __builtin_shufflevector(a, b, ((j & width) ? kLanes + j : j + width)...);
#else
        Vec lower = __builtin_shuffle(a, b, VecI{((j & width) ? kLanes + j - width : j)...});
        b = __builtin_shuffle(a, b, VecI{((j & width) ? kLanes + j : j + width)...});
#endif
        a = lower;
    }
};

#if DD_LANES == 16
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif DD_LANES == 8
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef Lanes<0, 1, 2, 3> AllLanes;
#endif

template <int width>
DD_INLINE void exchange_rows(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if ((i & width) == 0) AllLanes::exchange<width>(rows[i], rows[i + width]);
    }
}

// Transposes kLanes x kLanes floats.
DD_INLINE void transpose(Vec (&rows)[kLanes]) {
    exchange_rows<1>(rows);
    exchange_rows<2>(rows);
    if constexpr (kLanes > 4) exchange_rows<4>(rows);
    if constexpr (kLanes > 8) exchange_rows<8>(rows);
}

// to[i * to_stride] = the i-th values of the rows, a vector; rows from `count` on are zeros. read_at(offset, left)
// gives the values from an offset on.
template <class ReadAt>
DD_INLINE void read_transposed(ReadAt read_at, int64_t row_stride, int64_t count, int64_t length, float* to,
                               int64_t to_stride) {
    for_vectors(length, [&](int64_t i, int64_t left) {
        Vec rows[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) rows[r] = r < count ? read_at(r * row_stride + i, left) : Vec{};
        transpose(rows);
        int64_t vectors = left < kLanes ? left : kLanes;
        for (int64_t j = 0; j < vectors; ++j) store(to + (i + j) * to_stride, rows[j]);
    });
}

// The opposite: adds the vectors to the rows, or sets them.
DD_INLINE void write_transposed(const float* from, int64_t from_stride, int64_t count, int64_t length, float* to,
                                int64_t row_stride, bool accumulate) {
    for_vectors(length, [&](int64_t i, int64_t left) {
        Vec rows[kLanes];
        int64_t vectors = left < kLanes ? left : kLanes;
        for (int64_t j = 0; j < kLanes; ++j) rows[j] = j < vectors ? load(from + (i + j) * from_stride) : Vec{};
        transpose(rows);
        for (int64_t r = 0; r < count; ++r) {
            float* row = to + r * row_stride + i;
            store(row, left, accumulate ? rows[r] + load(row, left) : rows[r]);
        }
    });
}

}  // namespace dd::DD_ISA
