// The weights' gradient of a 3 x 3 convolution of stride 1 as the adjoint of Winograd's algorithm: for each point the
// product, summed over tiles, of transformed inputs and transformed output gradients,
//     dw = G^T [ sum over tiles of (B^T d B) o (A dy A^T) ] G.
//
// Packed inputs are [points][vectors of channels][tiles][kLanes], packed output gradients
// [points][panels][tiles][kPanel].

#include "common/product.h"
#include "conv2d/cpu_filters.h"
#include "conv2d/cpu_image.h"

// This uses the headers above.
#include "conv2d/cpu_winograd.h"

namespace dd::DD_ISA {

using conv2d::Block;
using conv2d::WeightGradient;

conv2d::Target conv2d_gradient_target(int64_t threads) { return {kLanes, kMostRows, threads}; }

// Rows of a transposed group: they must divide a vector of channels.
constexpr int kGradientRows = kLanes == 16 ? 8 : 4;

// Packs tiles [first, last) of a block's inputs, of one chunk of channels.
template <int m>
DD_INLINE void pack_gradient_input(const WeightGradient& a, const Block& block, int64_t chunk, int64_t first,
                                   int64_t last, float* scratch, float* packed) {
    const conv2d::Plan& plan = a.plan;
    int64_t channel = chunk * kChunk, left = a.shape.channels - channel, count = left < kChunk ? left : kChunk;
    int64_t plane = a.input_plane();
    Strip<m> strip(plan, scratch);
    for_strips(plan, block.first + first, block.first + last, [&](TilePlace place, int64_t tile, int64_t tiles) {
        strip.move_to(a.shape, place, tiles, [&](int64_t y, int64_t x, int64_t columns, float* to) {
            const Prologue none{nullptr, nullptr, 0};
            read_row(a.x, a.shape, place.sample, y, x, columns, channel, count, none, to, kChunk);
        });
        for (int64_t t = 0; t < tiles; ++t) {
            float* to = packed + channel * plan.block + (tile + t - block.first) * kLanes;
            for (int64_t c = 0; c < count; c += kLanes) {
                transform_square<conv2d::InputMatrix<m>, false>(
                    [&](int i, int j) DD_INLINE_LAMBDA { return load(strip.rows[i] + (t * m + j) * kChunk + c); },
                    [&](int i, int j, Vec value)
                        DD_INLINE_LAMBDA { store(to + (i * (m + 2) + j) * plane + c * plan.block, value); });
            }
        }
    });
}

// Packs tiles [first, last) of a block's output gradients, of one chunk of channels.
template <int m>
DD_INLINE void pack_output_gradient(const WeightGradient& a, const Block& block, int64_t chunk, int64_t first,
                                    int64_t last, float* scratch, float* packed) {
    const conv2d::Plan& plan = a.plan;
    const conv2d::Shape image = a.output_image();
    int64_t channel = chunk * kChunk, left = image.channels - channel, count = left < kChunk ? left : kChunk;
    int64_t plane = a.output_plane(kPanel), row_size = plan.tile_columns * m * kChunk;
    for_strips(plan, block.first + first, block.first + last, [&](TilePlace place, int64_t tile, int64_t tiles) {
        const Prologue none{nullptr, nullptr, 0};
        for (int64_t i = 0; i < m; ++i) {
            read_row(a.dy, image, place.sample, place.row * m + i, place.column * m, tiles * m, channel, count, none,
                     scratch + i * row_size, kChunk);
        }
        for (int64_t t = 0; t < tiles; ++t) {
            int64_t index = tile + t - block.first;
            for (int64_t c = 0; c < count; c += kLanes) {
                int64_t panel = (channel + c) / kPanel, column = (channel + c) % kPanel;
                float* to = packed + (panel * plan.block + index) * kPanel + column;
                const float* from = scratch + t * m * kChunk + c;
                transform_square<conv2d::Transposed<conv2d::OutputMatrix<m>>, false>(
                    [&](int i, int j) DD_INLINE_LAMBDA { return load(from + i * row_size + j * kChunk); },
                    [&](int i, int j, Vec value) DD_INLINE_LAMBDA { store(to + (i * (m + 2) + j) * plane, value); });
            }
        }
    });
}

// Zeroes the tiles that fill up a block's last vector of the depth, of one chunk of channels.
DD_INLINE void pad_tiles(const WeightGradient& a, int64_t tiles, int64_t width, int64_t chunk, int64_t plane,
                         float* packed) {
    int64_t padded = round_up(tiles, kLanes), depth = (plane - conv2d::kPlaneGap) / a.plan.block;
    for (int64_t point = 0; point < a.plan.points; ++point) {
        for (int64_t c = chunk * kChunk; c < (chunk + 1) * kChunk && c < depth; c += width) {
            float* to = packed + point * plane + c * a.plan.block;
            set_zero(to + tiles * width, (padded - tiles) * width);
        }
    }
}

// Packs parts [first, last): chunks of inputs, then chunks of output gradients, each divided into input_parts.
void conv2d_gradient_pack(const WeightGradient& a, const Block& block, int64_t first, int64_t last, float* inputs,
                          float* gradients, float* scratch) {
    const conv2d::Plan& plan = a.plan;
    int64_t of_inputs = divide_up(a.shape.channels, kChunk);
    for (int64_t part = first; part < last; ++part) {
        int64_t chunk = part / plan.input_parts, piece = part % plan.input_parts;
        int64_t from = piece * block.tiles / plan.input_parts, to = (piece + 1) * block.tiles / plan.input_parts;
        bool four = plan.method == conv2d::Method::winograd4, of_output = chunk >= of_inputs;
        if (of_output) {
            chunk -= of_inputs;
            (four ? pack_output_gradient<4> : pack_output_gradient<2>)(a, block, chunk, from, to, scratch, gradients);
            if (piece == 0) pad_tiles(a, block.tiles, kPanel, chunk, a.output_plane(kPanel), gradients);
        } else {
            (four ? pack_gradient_input<4> : pack_gradient_input<2>)(a, block, chunk, from, to, scratch, inputs);
            if (piece == 0) pad_tiles(a, block.tiles, kLanes, chunk, a.input_plane(), inputs);
        }
    }
}

// products: [points][kChunk][kPanel] of `count` channels and one panel.
DD_INLINE void multiply_gradient(const WeightGradient& a, int64_t tiles, int64_t panel, int64_t channel, int64_t count,
                                 const float* inputs, const float* gradients, float* products) {
    int64_t depth = round_up(tiles, kLanes), block = a.plan.block;
    for (int64_t point = 0; point < a.plan.points; ++point) {
        const float* columns = gradients + point * a.output_plane(kPanel) + panel * block * kPanel;
        const float* rows = inputs + point * a.input_plane() + channel * block;
        float* out = products + point * kChunk * kPanel;
        for (int64_t c = 0; c < count; c += kLanes) {
            for (int64_t r = 0; r < kLanes; r += kGradientRows) {
                multiply_chunks<kGradientRows, 2>(rows + c * block + r, columns, depth, TransposedRows{},
                                                  out + (c + r) * kPanel);
            }
        }
    }
}

// Transforms products back to weights, and sets or adds to those of the gradient.
template <int m>
DD_INLINE void write_gradient(const WeightGradient& a, bool accumulate, int64_t panel, int64_t channel, int64_t count,
                              const float* products, float* scratch) {
    constexpr int64_t point = kChunk * kPanel;
    for (int v = 0; v < 2; ++v) {
        int64_t output = panel * kPanel + v * kLanes, outputs = a.shape.outputs - output;
        if (outputs <= 0) break;
        for (int64_t c = 0; c < count; c += kLanes) {
            int64_t inputs = count - c < kLanes ? count - c : kLanes;
            for (int64_t i = 0; i < inputs; ++i) {
                const float* from = products + (c + i) * kPanel + v * kLanes;
                transform_square<conv2d::Transposed<conv2d::FilterMatrix<m>>, true>(
                    [&](int y, int x) DD_INLINE_LAMBDA { return load(from + (y * (m + 2) + x) * point); },
                    [&](int y, int x, Vec value)
                        DD_INLINE_LAMBDA { store(scratch + (i * 9 + y * 3 + x) * kLanes, value); });
            }
            write_filters(a.gradient, 9, output, outputs < kLanes ? outputs : kLanes, channel + c, inputs, scratch,
                          accumulate);
        }
    }
}

// Computes parts [first, last) of the gradient: a panel of outputs and a chunk of channels each.
void conv2d_gradient_multiply(const WeightGradient& a, const Block& block, int64_t first, int64_t last,
                              const float* inputs, const float* gradients, float* scratch) {
    float* products = scratch + 9 * kLanes * kLanes;
    for (int64_t part = first; part < last; ++part) {
        int64_t panel = part % a.plan.panels, channel = part / a.plan.panels * kChunk;
        int64_t left = a.shape.channels - channel, count = left < kChunk ? left : kChunk;
        multiply_gradient(a, block.tiles, panel, channel, count, inputs, gradients, products);
        auto write = a.plan.method == conv2d::Method::winograd4 ? write_gradient<4> : write_gradient<2>;
        write(a, block.first > 0, panel, channel, count, products, scratch);
    }
}

}  // namespace dd::DD_ISA
