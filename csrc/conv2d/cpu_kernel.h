// The two phases of a block of tiles: packing its input, then for each panel of outputs the products and their result.

#include "conv2d/cpu_filters.h"
#include "conv2d/cpu_gemm.h"
#include "conv2d/cpu_image.h"

// These use the headers above.
#include "conv2d/cpu_direct.h"
#include "conv2d/cpu_winograd.h"

namespace dd::DD_ISA {

using conv2d::Block;
using conv2d::Forward;
using conv2d::Method;
using conv2d::Plan;

conv2d::Target conv2d_target(int64_t threads) { return {kLanes, kMostRows, threads}; }

// Packs parts [first, last) of a block's input; scratch as input_scratch() says. Rows beyond the
// block's last tile keep what was there; their products are never read.
void conv2d_pack(const Forward& a, const Block& block, int64_t first, int64_t last, float* memory, float* scratch) {
    const Plan& plan = a.plan;
    Packed* packed = reinterpret_cast<Packed*>(memory);
    int64_t chunks = conv2d::divide_up(a.shape.channels, conv2d::kChunk);
    for (int64_t part = first; part < last; ++part) {
        bool direct = plan.method == Method::direct;
        int64_t piece = direct ? part : part / chunks, chunk = part % chunks;
        int64_t from = piece * block.tiles / plan.input_parts, to = (piece + 1) * block.tiles / plan.input_parts;
        if (direct) {
            pack_direct_input(a, block, from, to, scratch, packed);
        } else if (plan.method == Method::winograd4) {
            pack_winograd_input<4>(a, block, chunk, from, to, scratch, packed);
        } else {
            pack_winograd_input<2>(a, block, chunk, from, to, scratch, packed);
        }
    }
}

// Multiplies groups [first, last) of a block by a panel, chunk by chunk of channels.
DD_INLINE void multiply_panel(const Forward& a, int64_t panel, int64_t first, int64_t last, const Packed* packed,
                              Packed* filters, float* scratch, float* products) {
    using conv2d::kChunk;
    const Plan& plan = a.plan;
    const bool direct = plan.method == Method::direct;
    int64_t taps = direct ? a.shape.taps() : 1, from = 0;
    Product multiply_group = product_of(plan.rows, a.shape.outputs - panel * kPanel > kLanes);
    for (int64_t channel = 0; channel < a.shape.channels; channel += kChunk) {
        int64_t left = a.shape.channels - channel, count = left < kChunk ? left : kChunk;
        int64_t depth = conv2d::round_up(taps * count, kLanes);
        if (direct) {
            pack_direct_filters(a, panel, channel, count, scratch, filters);
        } else if (plan.method == Method::winograd4) {
            pack_winograd_filters<4>(a, panel, channel, count, scratch, filters);
        } else {
            pack_winograd_filters<2>(a, panel, channel, count, scratch, filters);
        }
        for (int64_t point = 0; point < plan.points; ++point) {
            const Packed* rows = packed + point * plan.plane() + from * plan.rows;
            float* out = products + point * plan.rows * kPanel;
            for (int64_t group = first; group < last; ++group, out += plan.points * plan.rows * kPanel) {
                multiply_group(rows + group * plan.depth * plan.rows, filters + point * filter_plane(depth), depth, out,
                               channel > 0);
            }
        }
        from += depth;
    }
}

// Computes parts [first, last) of a block's panels; scratch as panel_scratch() says.
void conv2d_multiply(const Forward& a, const Block& block, int64_t first, int64_t last, const float* memory,
                     float* scratch) {
    const Plan& plan = a.plan;
    const conv2d::PanelScratch at = conv2d::panel_scratch(a.shape, plan, kLanes);
    Packed* filters = reinterpret_cast<Packed*>(scratch + at.filters);
    float* products = scratch + at.products;
    int64_t groups = conv2d::divide_up(block.tiles, plan.rows);
    for (int64_t part = first; part < last; ++part) {
        int64_t panel = part / plan.panel_parts, piece = part % plan.panel_parts;
        int64_t from = piece * groups / plan.panel_parts, to = (piece + 1) * groups / plan.panel_parts;
        multiply_panel(a, panel, from, to, reinterpret_cast<const Packed*>(memory), filters, scratch, products);
        int64_t last_tile = to * plan.rows < block.tiles ? to * plan.rows : block.tiles;
        for (int64_t tile = from * plan.rows; tile < last_tile; ++tile) {
            int64_t index = tile - from * plan.rows, group = index / plan.rows, row = index % plan.rows;
            const float* of_tile = products + group * plan.points * plan.rows * kPanel + row * kPanel;
            if (plan.method == Method::direct) {
                write_direct_pixel(a, block.first + tile, panel, of_tile);
            } else if (plan.method == Method::winograd4) {
                write_winograd_tile<4>(a, block.first + tile, panel, of_tile);
            } else {
                write_winograd_tile<2>(a, block.first + tile, panel, of_tile);
            }
        }
    }
}

}  // namespace dd::DD_ISA
