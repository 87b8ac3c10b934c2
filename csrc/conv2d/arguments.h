// What a call of conv2d carries, and how its work is divided. Independent of the instruction set.
#pragma once

#include "common/layout.h"
#include "common/sizes.h"

namespace dd::conv2d {

// The algorithms, with the numbers of `int method` in the op's schema. The first two leave the choice to the cost model
// of plan.h: among all, or among those at least as accurate as a direct sum.
enum class Method : int64_t { fastest, accurate, direct, winograd2, winograd4 };

// Elements between two points' planes of packed matrices, so that planes start in different cache sets.
constexpr int64_t kPlaneGap = 32;

// Images lie in memory as [samples][height][width][channels]. Rows and columns beyond the image are zeros: `top` and
// `left` of them come first, and as many follow as the output's size asks for. Where the input is `doubled`, `height`
// and `width` are those of the image that is convolved, of which each pixel in memory is 2 x 2.
struct Shape {
    int64_t samples, channels, height, width;
    int64_t outputs, out_height, out_width;
    int64_t kernel_height, kernel_width, stride, top, left;
    bool doubled;

    int64_t taps() const { return kernel_height * kernel_width; }
};

// Weights: the element of an output, an input and a tap (numbered row by row) lies at output * output_stride +
// input * input_stride + tap * tap_stride. `turned` reads the taps backwards, a rotation by 180 degrees.
struct Filters {
    Operand values;
    int64_t output_stride, input_stride, tap_stride;
    bool turned;
};

// The machine as a plan sees it: vector lanes, rows that the micro-kernel multiplies at most, threads.
struct Target {
    int64_t lanes, most_rows, threads;

    int64_t panel() const { return 2 * lanes; }
};

// How the work is divided. A tile is a square of `tile` x `tile` output pixels; the products of all its `points` are
// matrix products in which each tile is a row. Panels of output channels are the columns.
struct Plan {
    Method method;
    int64_t tile, points;
    int64_t tile_rows, tile_columns;  // of one sample
    int64_t rows;                     // tiles that the micro-kernel multiplies at a time: a group
    int64_t blocks;                   // tiles are transformed, then multiplied, in so many parts of whole groups
    int64_t block;                    // tiles of the largest: a multiple of rows
    bool apart;                       // each thread computes blocks of its own, else all threads share one at a time
    int64_t slice;                    // groups that are multiplied by a panel before their outputs are written
    int64_t depth;                    // length of a packed row
    int64_t panels, panel_parts;      // a block's products are divided by panels, and by groups
    int64_t input_parts;              // packing a block's input is divided by chunks of channels, and by tiles

    int64_t tiles(const Shape& shape) const { return shape.samples * tile_rows * tile_columns; }
    // Distance of two points' planes of packed input; 16 more than needed, so that planes start in different cache
    // sets.
    int64_t plane() const { return block * depth + 16; }
};

// Floats between two points' planes of a panel's packed filters.
constexpr int64_t filter_plane(const Plan& plan, int64_t panel) { return plan.depth * panel + kPlaneGap; }

// Floats between two points' planes of the products of a slice.
constexpr int64_t product_plane(const Plan& plan, int64_t panel) { return plan.slice * plan.rows * panel + kPlaneGap; }

// Floats of a panel's packed filters.
constexpr int64_t panel_size(const Plan& plan, int64_t panel) { return plan.points * filter_plane(plan, panel); }

// Where a thread's workspace of a panel begins, in floats: the filters of one vector as they are read, those of the
// panel as they are packed, and the products of a slice.
struct PanelScratch {
    int64_t filters, products, size;
};

inline PanelScratch panel_scratch(const Shape& shape, const Plan& plan, int64_t lanes) {
    int64_t panel = 2 * lanes, filters = shape.taps() * lanes * lanes;
    int64_t products = filters + panel_size(plan, panel);
    return {filters, products, products + plan.points * product_plane(plan, panel)};
}

// Tiles [first, first + tiles) of all samples' tiles.
struct Block {
    int64_t first, tiles;
};

// Blocks differ by one group at most.
inline Block block_of(const Shape& shape, const Plan& plan, int64_t index) {
    int64_t tiles = plan.tiles(shape), groups = divide_up(tiles, plan.rows);
    int64_t first = index * groups / plan.blocks * plan.rows, last = (index + 1) * groups / plan.blocks * plan.rows;
    return {first, (last < tiles ? last : tiles) - first};
}

struct Forward {
    Shape shape;
    Plan plan;
    Operand x;
    const float *scale, *shift;  // [samples][channels], or null
    int64_t activation;
    Filters filters;
    const float* kept;  // the packed filters of all panels, or null: each panel packs its own
    const float* bias;  // [outputs], or null
    Operand residual, y;
};

struct WeightGradient {
    Shape shape;
    Plan plan;
    Operand x, dy;
    Filters gradient;  // written

    // dy as an image of its own, and the distances of two points' planes of packed inputs and output gradients.
    Shape output_image() const { return {shape.samples, shape.outputs, shape.out_height, shape.out_width}; }
    int64_t input_plane() const { return plan.block * plan.depth + kPlaneGap; }
    int64_t output_plane(int64_t panel) const { return plan.block * plan.panels * panel + kPlaneGap; }
};

}  // namespace dd::conv2d
