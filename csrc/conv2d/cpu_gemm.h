// The micro-kernel: a group of packed rows times a panel of two vectors of columns, both along one depth.
//
// Packed rows: blocks of kLanes of the depth, in each block the rows, of each row kLanes floats; or, transposed, for
// each step of the depth kLanes rows (of float32 only). A packed panel: for each step of the depth 2 kLanes columns.
// Sums are over kChunk of the depth at a time: their chains of roundings stay short.

#include "conv2d/arguments.h"
#include "conv2d/cpu_packed.h"

namespace dd::DD_ISA {

// Rows times 2 accumulators, 2 vectors of the panel and one broadcast must fit the registers: 32 of AVX-512, else 16.
constexpr int kMostRows = kLanes == 16 ? 8 : 6;

// Where element (row, step) of a block of kLanes steps lies, and how far the next block is.
template <int rows, bool transposed>
struct Steps {
    static constexpr int row = transposed ? 1 : kLanes, step = transposed ? kLanes : 1;
    static constexpr int block = transposed ? kLanes * kLanes : rows * kLanes;
};

template <int rows, int vectors, bool transposed>
DD_INLINE void multiply(const Packed* a, const Packed* b, int64_t blocks, Vec (&sum)[rows][vectors]) {
    using At = Steps<rows, transposed>;
    for (int64_t i = 0; i < blocks; ++i, a += At::block, b += kLanes * kPanel) {
#pragma GCC unroll 4
        for (int step = 0; step < kLanes; step += kStep) {
            Factor column[vectors];
            for (int v = 0; v < vectors; ++v) {
                const Packed* at = b + step * kPanel + v * kLanes * kStep;
                column[v] = load_factor(at);
                fetch_ahead(at);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                Factor element = splat_factor(a + r * At::row + step * At::step);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(element, column[v], sum[r][v]);
            }
        }
    }
}

// out [rows][kPanel] = a b; depth is a multiple of kLanes.
template <int rows, int vectors, bool transposed>
void product(const Packed* a, const Packed* b, int64_t depth, float* out) {
    using At = Steps<rows, transposed>;
    for (int64_t first = 0; first < depth; first += conv2d::kChunk) {
        int64_t left = depth - first < conv2d::kChunk ? depth - first : conv2d::kChunk;
        Vec sum[rows][vectors]{};
        multiply<rows, vectors, transposed>(a + first / kLanes * At::block, b + first * kPanel, left / kLanes, sum);
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

typedef void (*Product)(const Packed* a, const Packed* b, int64_t depth, float* out);

// The product of groups of `rows` and of a panel whose second vector is needed or not.
DD_INLINE Product product_of(int64_t rows, bool two) {
    static constexpr Product one_vector[] = {product<1, 1, false>, product<2, 1, false>, product<3, 1, false>,
                                             product<4, 1, false>, product<5, 1, false>, product<6, 1, false>,
                                             product<7, 1, false>, product<8, 1, false>};
    static constexpr Product two_vectors[] = {product<1, 2, false>, product<2, 2, false>, product<3, 2, false>,
                                              product<4, 2, false>, product<5, 2, false>, product<6, 2, false>,
                                              product<7, 2, false>, product<8, 2, false>};
    return (two ? two_vectors : one_vector)[rows - 1];
}

}  // namespace dd::DD_ISA
