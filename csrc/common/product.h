// The micro-kernel: a group of rows times a panel of two vectors of columns, both along one depth.
//
// A packed panel: for each step of the depth 2 kLanes columns. Sums are over kChunk of the depth at a time: their
// chains of roundings stay short.

#include "common/packed.h"
#include "common/sizes.h"

namespace dd::DD_ISA {

// Rows times 2 accumulators, 2 vectors of the panel and one broadcast must fit the registers: 32 of AVX-512, else 16.
constexpr int kMostRows = kLanes == 16 ? 8 : 6;

// How rows lie in memory, in blocks of kLanes steps of the depth: where element (row, step) of a block is, and how far
// the next block. Those that lie in some larger matrix are made of a stride of it.
template <int rows>
struct PackedRows {  // in each block the rows, of each row kLanes steps
    static constexpr int64_t row = kLanes, step = 1, block = rows * kLanes;
    explicit PackedRows(int64_t) {}
};
struct TransposedRows {  // for each step kLanes rows, of float32 only
    static constexpr int64_t row = 1, step = kLanes, block = kLanes * kLanes;
};
template <int>
struct WholeRows {  // each row whole, as the channels of a pixel are
    int64_t row;
    static constexpr int64_t step = 1, block = kLanes;
    explicit WholeRows(int64_t stride) : row(stride) {}
};
template <int>
struct RowsOfColumns {  // for each kStep steps all rows, kStep elements of each
    static constexpr int64_t row = kStep;
    int64_t step, block;
    explicit RowsOfColumns(int64_t stride) : step(stride), block(kLanes * stride) {}
};

// Adds a b to the sums. One that `fetches` brings a vector for each step of the depth near meanwhile, from `next` on.
template <int rows, int vectors, bool fetches, class At>
DD_INLINE void multiply(const Packed* a, const Packed* b, int64_t blocks, At at, const Packed* next,
                        Vec (&sum)[rows][vectors]) {
    for (int64_t i = 0; i < blocks; ++i, a += at.block, b += kLanes * kPanel) {
#pragma GCC unroll 4
        for (int step = 0; step < kLanes; step += kStep) {
            if constexpr (fetches) __builtin_prefetch(next + (i * kLanes + step) * kLanes, 0, 2);
            Factor column[vectors];
            for (int v = 0; v < vectors; ++v) column[v] = load_factor(b + step * kPanel + v * kLanes * kStep);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                Factor element = splat_factor(a + r * at.row + step * at.step);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(element, column[v], sum[r][v]);
            }
        }
    }
}

// out [rows][kPanel] = a b; depth is a multiple of kLanes.
template <int rows, int vectors, bool fetches = false, class At>
DD_INLINE void multiply_chunks(const Packed* a, const Packed* b, int64_t depth, At at, float* out,
                               const Packed* next = nullptr) {
    for (int64_t first = 0; first < depth; first += kChunk) {
        int64_t left = depth - first < kChunk ? depth - first : kChunk;
        Vec sum[rows][vectors]{};
        multiply<rows, vectors, fetches>(a + first / kLanes * at.block, b + first * kPanel, left / kLanes, at,
                                         fetches ? next + first * kLanes : nullptr, sum);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) {
                float* to = out + r * kPanel + v * kLanes;
                if (first > 0) sum[r][v] += load(to);
                store(to, sum[r][v]);
            }
        }
    }
}

// A product of some number of rows that lie as `stride` tells. Those that fetch do it from `next` on.
typedef void (*Product)(const Packed* a, const Packed* b, int64_t depth, int64_t stride, float* out,
                        const Packed* next);

template <template <int> class At, int rows, int vectors, bool fetches>
void product(const Packed* a, const Packed* b, int64_t depth, int64_t stride, float* out, const Packed* next) {
    multiply_chunks<rows, vectors, fetches>(a, b, depth, At<rows>(stride), out, next);
}

template <template <int> class At, int vectors, bool fetches = false>
DD_INLINE Product product_of_rows(int64_t rows) {
    static constexpr Product products[] = {product<At, 1, vectors, fetches>, product<At, 2, vectors, fetches>,
                                           product<At, 3, vectors, fetches>, product<At, 4, vectors, fetches>,
                                           product<At, 5, vectors, fetches>, product<At, 6, vectors, fetches>,
                                           product<At, 7, vectors, fetches>, product<At, 8, vectors, fetches>};
    return products[rows - 1];
}

// The product of groups of `rows` and of a panel whose second vector is needed or not.
template <template <int> class At, bool fetches = false>
DD_INLINE Product product_of(int64_t rows, bool two) {
    return two ? product_of_rows<At, 2, fetches>(rows) : product_of_rows<At, 1, fetches>(rows);
}

}  // namespace dd::DD_ISA
