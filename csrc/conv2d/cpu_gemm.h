// The micro-kernel: a group of rows times a panel of two vectors of columns, both along one depth.
//
// A packed panel: for each step of the depth 2 kLanes columns. Sums are over kChunk of the depth at a time: their
// chains of roundings stay short.

#include "conv2d/arguments.h"
#include "conv2d/cpu_packed.h"

namespace dd::DD_ISA {

// Rows times 2 accumulators, 2 vectors of the panel and one broadcast must fit the registers: 32 of AVX-512, else 16.
constexpr int kMostRows = kLanes == 16 ? 8 : 6;

// How rows lie in memory, in blocks of kLanes steps of the depth: where element (row, step) of a block is, and how far
// the next block.
template <int rows>
struct PackedRows {  // in each block the rows, of each row kLanes steps
    static constexpr int64_t row = kLanes, step = 1, block = rows * kLanes;
};
struct TransposedRows {  // for each step kLanes rows, of float32 only
    static constexpr int64_t row = 1, step = kLanes, block = kLanes * kLanes;
};
struct PixelRows {  // each row whole, as the channels of a pixel are, of float32 only
    int64_t row;
    static constexpr int64_t step = 1, block = kLanes;
};

template <int rows, int vectors, class At>
DD_INLINE void multiply(const Packed* a, const Packed* b, int64_t blocks, At at, Vec (&sum)[rows][vectors]) {
    for (int64_t i = 0; i < blocks; ++i, a += at.block, b += kLanes * kPanel) {
#pragma GCC unroll 4
        for (int step = 0; step < kLanes; step += kStep) {
            Factor column[vectors];
            for (int v = 0; v < vectors; ++v) {
                const Packed* panel = b + step * kPanel + v * kLanes * kStep;
                column[v] = load_factor(panel);
                fetch_ahead(panel);
            }
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
template <int rows, int vectors, class At>
DD_INLINE void multiply_chunks(const Packed* a, const Packed* b, int64_t depth, At at, float* out) {
    for (int64_t first = 0; first < depth; first += conv2d::kChunk) {
        int64_t left = depth - first < conv2d::kChunk ? depth - first : conv2d::kChunk;
        Vec sum[rows][vectors]{};
        multiply<rows, vectors>(a + first / kLanes * at.block, b + first * kPanel, left / kLanes, at, sum);
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

// The product of packed rows, or of pixels that lie `pixel` apart if that is not 0.
typedef void (*Product)(const Packed* a, const Packed* b, int64_t depth, int64_t pixel, float* out);

template <int rows, int vectors, bool pixels>
void product(const Packed* a, const Packed* b, int64_t depth, int64_t pixel, float* out) {
    if constexpr (pixels) {
        multiply_chunks<rows, vectors>(a, b, depth, PixelRows{pixel}, out);
    } else {
        multiply_chunks<rows, vectors>(a, b, depth, PackedRows<rows>{}, out);
    }
}

template <int vectors, bool pixels>
DD_INLINE Product product_of_rows(int64_t rows) {
    static constexpr Product products[] = {product<1, vectors, pixels>, product<2, vectors, pixels>,
                                           product<3, vectors, pixels>, product<4, vectors, pixels>,
                                           product<5, vectors, pixels>, product<6, vectors, pixels>,
                                           product<7, vectors, pixels>, product<8, vectors, pixels>};
    return products[rows - 1];
}

// The product of groups of `rows`, packed or pixels, and of a panel whose second vector is needed or not.
DD_INLINE Product product_of(int64_t rows, bool two, bool pixels) {
    if (kPackedFloat32 && pixels) return two ? product_of_rows<2, true>(rows) : product_of_rows<1, true>(rows);
    return two ? product_of_rows<2, false>(rows) : product_of_rows<1, false>(rows);
}

}  // namespace dd::DD_ISA
