// Winograd's transforms of tiles of inputs, filters and outputs, a vector of channels at a time.

#include "conv2d/arguments.h"
#include "conv2d/winograd_matrices.h"

namespace dd::DD_ISA {

// The sum of M[row][j] in[j] over j = first, first + step, ..., without `skipped` columns. It starts with the first
// term whose coefficient is 1, which costs nothing, where there is one; coefficients 0 cost nothing either.
template <class M, int step, class Skipped>
DD_INLINE Vec row_sum(int row, int first, const Vec* in, Skipped skipped) {
    int start = -1;
#pragma GCC unroll 6
    for (int j = first; j < M::value.columns; j += step) {
        if (start < 0 && M::value.at[row][j] == 1 && !skipped(j)) start = j;
    }
    bool empty = start < 0;
    Vec total = empty ? Vec{} : in[start];
#pragma GCC unroll 6
    for (int j = first; j < M::value.columns; j += step) {
        const float c = static_cast<float>(M::value.at[row][j]);
        if (c == 0 || j == start || skipped(j)) continue;
        if (empty) {
            total = in[j] * c;
        } else {
            total = c == 1 ? total + in[j] : fma(in[j], c, total);
        }
        empty = false;
    }
    return total;
}

template <class M, int step>
DD_INLINE Vec row_sum(int row, int first, const Vec* in) {
    return row_sum<M, step>(row, first, in, [](int) DD_INLINE_LAMBDA { return false; });
}

// out = M in for B^T, G and A, where the rows of +a and -a differ in the sign of their odd columns: sums of the even
// and of the odd columns serve both.
template <class M>
DD_INLINE void map_row_pairs(const Vec* in, Vec* out) {
    constexpr int rows = M::value.rows;
    out[0] = row_sum<M, 1>(0, 0, in);
#pragma GCC unroll 6
    for (int row = 1; row + 1 < rows; row += 2) {
        Vec even = row_sum<M, 2>(row, 0, in), odd = row_sum<M, 2>(row, 1, in);
        out[row] = even + odd;
        out[row + 1] = even - odd;
    }
    out[rows - 1] = row_sum<M, 1>(rows - 1, 0, in);
}

// out = M in for A^T and G^T, where the columns of +a and -a are equal in even rows and opposite in odd ones.
template <class M>
DD_INLINE void map_column_pairs(const Vec* in, Vec* out) {
    constexpr int columns = M::value.columns;
    Vec even[columns], odd[columns];
    even[0] = odd[0] = in[0];
    even[columns - 1] = odd[columns - 1] = in[columns - 1];
#pragma GCC unroll 6
    for (int j = 1; j + 1 < columns; j += 2) {
        even[j] = in[j] + in[j + 1];
        odd[j] = in[j] - in[j + 1];
    }
    // Coefficients stand in the first column of a pair; the second one's place is left out of the sums.
    auto second = [](int j) DD_INLINE_LAMBDA { return j > 0 && j % 2 == 0 && j < columns - 1; };
#pragma GCC unroll 6
    for (int row = 0; row < M::value.rows; ++row) out[row] = row_sum<M, 1>(row, 0, row % 2 == 0 ? even : odd, second);
}

template <class M, bool column_pairs>
DD_INLINE void map(const Vec* in, Vec* out) {
    if constexpr (column_pairs) {
        map_column_pairs<M>(in, out);
    } else {
        map_row_pairs<M>(in, out);
    }
}

// to(i, j, value) for every element of M d M^T; from(i, j) gives those of d.
template <class M, bool column_pairs, class From, class To>
DD_INLINE void transform_square(From from, To to) {
    constexpr int rows = M::value.rows, columns = M::value.columns;
    Vec half[rows][columns];
#pragma GCC unroll 6
    for (int j = 0; j < columns; ++j) {
        Vec column[columns], mapped[rows];
#pragma GCC unroll 6
        for (int i = 0; i < columns; ++i) column[i] = from(i, j);
        map<M, column_pairs>(column, mapped);
#pragma GCC unroll 6
        for (int i = 0; i < rows; ++i) half[i][j] = mapped[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
        Vec mapped[rows];
        map<M, column_pairs>(half[i], mapped);
#pragma GCC unroll 6
        for (int j = 0; j < rows; ++j) to(i, j, mapped[j]);
    }
}

// Where a tile lies: its sample, and its first output row and column.
struct TilePlace {
    int64_t sample, row, column;
};

DD_INLINE TilePlace place_of(const conv2d::Plan& plan, int64_t tile) {
    int64_t per_sample = plan.tile_rows * plan.tile_columns, in_sample = tile % per_sample;
    return {tile / per_sample, in_sample / plan.tile_columns, in_sample % plan.tile_columns};
}

// Rows of a strip of tiles, of one chunk of channels, as they enter the transform: m + 2 rows of [columns][kChunk]. The
// last two are the first two of the strip below, which takes them over.
template <int m>
struct Strip {
    static constexpr int kRows = m + 2;
    float* rows[kRows];
    TilePlace place{-1, 0, 0};
    int64_t tiles = 0;

    static int64_t row_size(const conv2d::Plan& plan) { return (plan.tile_columns * m + 2) * kChunk; }

    DD_INLINE Strip(const conv2d::Plan& plan, float* scratch) {
        for (int i = 0; i < kRows; ++i) rows[i] = scratch + i * row_size(plan);
    }

    // read_row(y, x, columns, to) is called for the rows that the strip above did not read.
    template <class ReadRow>
    DD_INLINE void move_to(const conv2d::Shape& shape, TilePlace next, int64_t count, ReadRow read) {
        bool below =
            next.sample == place.sample && next.row == place.row + 1 && next.column == place.column && count == tiles;
        for (int i = 0; below && i < 2; ++i) {
            float* row = rows[i];
            rows[i] = rows[m + i];
            rows[m + i] = row;
        }
        for (int i = below ? 2 : 0; i < kRows; ++i) {
            read(next.row * m + i - shape.top, next.column * m - shape.left, count * m + 2, rows[i]);
        }
        place = next;
        tiles = count;
    }
};

// Calls body(strip, first tile, tiles) for the parts of tiles [first, last) that lie side by side.
template <class Body>
DD_INLINE void for_strips(const conv2d::Plan& plan, int64_t first, int64_t last, Body body) {
    while (first < last) {
        TilePlace place = place_of(plan, first);
        int64_t count = plan.tile_columns - place.column;
        if (count > last - first) count = last - first;
        body(place, first, count);
        first += count;
    }
}

// Transforms the filters of a panel, of input channels [first, first + count): to [points][round_up(count)][kPanel],
// the points' planes `plane` apart.
template <int m>
DD_INLINE void pack_winograd_filters(const conv2d::Forward& a, int64_t panel, int64_t first, int64_t count,
                                     float* scratch, Packed* to, int64_t plane) {
    constexpr int points = m + 2;
    int64_t padded = round_up(count, kLanes);
    // Taps are read backwards where the filters are turned.
    const int64_t start = a.filters.turned ? 8 * kLanes : 0, step = a.filters.turned ? -kLanes : kLanes;
    for (int v = 0; v < 2; ++v) {
        int64_t output = panel * kPanel + v * kLanes, outputs = a.shape.outputs - output;
        if (outputs <= 0) break;
        for (int64_t c = 0; c < padded; c += kLanes) {
            int64_t inputs = count - c < kLanes ? count - c : kLanes;
            read_filters(a.filters, 9, output, outputs < kLanes ? outputs : kLanes, first + c, inputs, scratch);
            set_zero(scratch + inputs * 9 * kLanes, (kLanes - inputs) * 9 * kLanes);
            for (int64_t i = 0; i < kLanes; ++i) {
                const float* taps = scratch + i * 9 * kLanes + start;
                transform_square<conv2d::FilterMatrix<m>, false>(
                    [&](int y, int x) DD_INLINE_LAMBDA { return load(taps + (y * 3 + x) * step); },
                    [&](int y, int x, Vec value)
                        DD_INLINE_LAMBDA { put_columns(to + (y * points + x) * plane, c + i, v * kLanes, value); });
            }
        }
    }
}

// Transforms tiles [first, last) of a block, of the channels of one chunk.
template <int m>
DD_INLINE void pack_winograd_input(const conv2d::Forward& a, const conv2d::Block& block, int64_t chunk, int64_t first,
                                   int64_t last, float* scratch, Packed* packed) {
    const conv2d::Plan& plan = a.plan;
    int64_t channel = chunk * kChunk, left = a.shape.channels - channel, count = left < kChunk ? left : kChunk;
    Strip<m> strip(plan, scratch);
    for_strips(plan, block.first + first, block.first + last, [&](TilePlace place, int64_t tile, int64_t tiles) {
        strip.move_to(a.shape, place, tiles, [&](int64_t y, int64_t x, int64_t columns, float* to) {
            Prologue prologue = prologue_of(a, place.sample);
            read_row(a.x, a.shape, place.sample, y, x, columns, channel, count, prologue, to, kChunk);
        });
        for (int64_t t = 0; t < tiles; ++t) {
            int64_t index = tile + t - block.first, group = index / plan.rows, row = index % plan.rows;
            Packed* to = packed + (group * plan.depth + channel) * plan.rows + row * kLanes;
            int64_t at = t * m * kChunk, plane = plan.plane();
            for (int64_t c = 0; c < count; c += kLanes) {
                transform_square<conv2d::InputMatrix<m>, false>(
                    [&](int i, int j) DD_INLINE_LAMBDA { return load(strip.rows[i] + at + j * kChunk + c); },
                    [&](int i, int j, Vec value)
                        DD_INLINE_LAMBDA { put_row(to + (i * (m + 2) + j) * plane + c * plan.rows, value); });
            }
        }
    });
}

// Transforms the products of one tile and a panel back, and writes its outputs. products: [points][kPanel], the points
// product_plane() apart.
template <int m>
DD_INLINE void write_winograd_tile(const conv2d::Forward& a, int64_t tile, int64_t panel, const float* products) {
    const conv2d::Shape& shape = a.shape;
    TilePlace place = place_of(a.plan, tile);
    int64_t point = conv2d::product_plane(a.plan, kPanel);
    for (int v = 0; v < 2; ++v) {
        int64_t output = panel * kPanel + v * kLanes, left = shape.outputs - output;
        if (left <= 0) break;
        Vec bias = a.bias != nullptr ? load(a.bias + output, left) : Vec{};
        transform_square<conv2d::OutputMatrix<m>, true>(
            [&](int i, int j) DD_INLINE_LAMBDA { return load(products + (i * (m + 2) + j) * point + v * kLanes); },
            [&](int i, int j, Vec value) DD_INLINE_LAMBDA {
                int64_t y = place.row * m + i, x = place.column * m + j;
                if (y >= shape.out_height || x >= shape.out_width) return;
                int64_t at = (y * shape.out_width + x) * shape.outputs + output;
                value += bias;
                if (a.residual) value += read(a.residual, place.sample * a.residual.sample_stride + at, left);
                write(a.y, place.sample * a.y.sample_stride + at, left, value);
            });
    }
}

// Fetches what a tile's outputs are written to.
template <int m>
DD_INLINE void fetch_tile(const conv2d::Forward& a, int64_t tile, int64_t panel) {
    const TilePlace place = place_of(a.plan, tile);
    const int64_t first = place.row * m * a.shape.out_width + place.column * m;
    for (int64_t i = 0; i < m * m; ++i) {
        int64_t pixel = first + i / m * a.shape.out_width + i % m;
        fetch_outputs(a, place.sample * a.y.sample_stride + pixel * a.shape.outputs + panel * kPanel);
    }
}

// Writes the outputs of tiles [first, last), whose products these are. What comes 16 pixels later is fetched meanwhile.
template <int m>
DD_INLINE void write_winograd_tiles(const conv2d::Forward& a, int64_t panel, int64_t first, int64_t last,
                                    const float* products) {
    constexpr int64_t ahead = 16 / (m * m);
    for (int64_t tile = first; tile < last; ++tile, products += kPanel) {
        if (tile + ahead < last) fetch_tile<m>(a, tile + ahead, panel);
        write_winograd_tile<m>(a, tile, panel, products);
    }
}

}  // namespace dd::DD_ISA
