// The two phases of a block of tiles: packing its input, then for each panel of outputs the products and their result.

#include "common/product.h"
#include "conv2d/cpu_filters.h"
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
    int64_t chunks = divide_up(a.shape.channels, kChunk);
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

// Packs the filters of a panel to [points][depth][kPanel], the planes filter_plane() apart.
DD_INLINE void pack_filters(const Forward& a, int64_t panel, float* scratch, Packed* to) {
    const bool direct = a.plan.method == Method::direct;
    const int64_t plane = conv2d::filter_plane(a.plan, kPanel), taps = direct ? a.shape.taps() : 1;
    for (int64_t channel = 0; channel < a.shape.channels; channel += kChunk) {
        int64_t left = a.shape.channels - channel, count = left < kChunk ? left : kChunk;
        Packed* chunk = to + taps * channel * kPanel;
        if (direct) {
            pack_direct_filters(a, panel, channel, count, scratch, chunk);
        } else if (a.plan.method == Method::winograd4) {
            pack_winograd_filters<4>(a, panel, channel, count, scratch, chunk, plane);
        } else {
            pack_winograd_filters<2>(a, panel, channel, count, scratch, chunk, plane);
        }
    }
}

// Packs the filters of panels [first, last) to `kept`; scratch as panel_scratch() says.
void conv2d_pack_filters(const Forward& a, int64_t first, int64_t last, float* kept, float* scratch) {
    for (int64_t panel = first; panel < last; ++panel) {
        pack_filters(a, panel, scratch, reinterpret_cast<Packed*>(kept) + panel * conv2d::panel_size(a.plan, kPanel));
    }
}

// Multiplies groups [first, last) of a block by a panel: products [points][groups][rows][kPanel], the planes
// product_plane() apart. The filters of a point stay in the cache for all groups, whose packed rows follow each other.
//
// Filters that were packed before, kept or for blocks computed apart, come from memory or the last-level cache, which
// takes as long as their products where there are few groups. So that both overlap, the first two groups fetch half of
// the next point's filters each. A group alone fetches none: it reads its own as fast as memory gives them.
DD_INLINE void multiply_groups(const Forward& a, bool two, int64_t first, int64_t last, const Packed* packed,
                               const Packed* filters, float* products) {
    const Plan& plan = a.plan;
    const int64_t plane = conv2d::filter_plane(plan, kPanel);
    const Product multiply_group = product_of<PackedRows>(plan.rows, two);
    const Product multiply_and_fetch = product_of<PackedRows, true>(plan.rows, two);
    const int64_t fetching = a.kept != nullptr && last - first > 1 ? first + 2 : first;
    for (int64_t point = 0; point < plan.points; ++point, filters += plane) {
        const Packed *rows = packed + point * plan.plane() + first * plan.depth * plan.rows, *next = filters + plane;
        float* out = products + point * conv2d::product_plane(plan, kPanel);
        for (int64_t group = first; group < last; ++group) {
            (group < fetching ? multiply_and_fetch : multiply_group)(rows, filters, plan.depth, 0, out, next);
            rows += plan.depth * plan.rows;
            next += plan.depth * kLanes;
            out += plan.rows * kPanel;
        }
    }
}

// The same of pixels [first, last) of the image, which are rows as they lie: products [pixels][kPanel]. What they are
// written to is fetched meanwhile, which otherwise takes a twentieth of the time where it is much.
DD_INLINE void multiply_pixels(const Forward& a, int64_t panel, bool two, int64_t first, int64_t last,
                               const Packed* filters, float* products) {
    const int64_t channels = a.shape.channels, group = a.plan.rows;
    const Packed* image = static_cast<const Packed*>(a.x.data);
    for (int64_t pixel = first; pixel < last; pixel += group, products += group * kPanel) {
        const int64_t rows = last - pixel < group ? last - pixel : group;
        for (int64_t i = pixel; i < pixel + rows; ++i) fetch_outputs(a, i * a.shape.outputs + panel * kPanel);
        product_of<WholeRows>(rows, two)(image + pixel * channels, filters, channels, channels, products, nullptr);
    }
}

// Writes the outputs of tiles [first, last), whose products these are.
DD_INLINE void write_tiles(const Forward& a, int64_t panel, int64_t first, int64_t last, const float* products) {
    if (a.plan.method == Method::winograd4) {
        write_winograd_tiles<4>(a, panel, first, last, products);
    } else if (a.plan.method == Method::winograd2) {
        write_winograd_tiles<2>(a, panel, first, last, products);
    } else {
        for (int64_t pixel = first; pixel < last; ++pixel, products += kPanel) {
            write_direct_pixel(a, pixel, panel, products);
        }
    }
}

// Computes parts [first, last) of a block's panels; scratch as panel_scratch() says.
void conv2d_multiply(const Forward& a, const Block& block, int64_t first, int64_t last, const float* memory,
                     float* scratch) {
    const Plan& plan = a.plan;
    const conv2d::PanelScratch at = conv2d::panel_scratch(a.shape, plan, kLanes);
    float* products = scratch + at.products;
    int64_t groups = divide_up(block.tiles, plan.rows);
    for (int64_t part = first; part < last; ++part) {
        int64_t panel = part / plan.panel_parts, piece = part % plan.panel_parts;
        int64_t from = piece * groups / plan.panel_parts, to = (piece + 1) * groups / plan.panel_parts;
        bool two = a.shape.outputs - panel * kPanel > kLanes;
        const Packed* filters = reinterpret_cast<const Packed*>(scratch + at.filters);
        if (a.kept != nullptr) {
            filters = reinterpret_cast<const Packed*>(a.kept) + panel * conv2d::panel_size(plan, kPanel);
        } else {
            pack_filters(a, panel, scratch, reinterpret_cast<Packed*>(scratch + at.filters));
        }
        for (int64_t group = from; group < to; group += plan.slice) {
            int64_t end = group + plan.slice < to ? group + plan.slice : to;
            int64_t tiles = end * plan.rows < block.tiles ? end * plan.rows : block.tiles;
            int64_t first_tile = block.first + group * plan.rows, last_tile = block.first + tiles;
            if (multiplies_pixels(a)) {
                multiply_pixels(a, panel, two, first_tile, last_tile, filters, products);
            } else {
                multiply_groups(a, two, group, end, reinterpret_cast<const Packed*>(memory), filters, products);
            }
            write_tiles(a, panel, first_tile, last_tile, products);
        }
    }
}

}  // namespace dd::DD_ISA
