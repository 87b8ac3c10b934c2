#include <algorithm>

#include "conv2d/plan.h"

namespace dd::conv2d {
namespace {

// Workspace in floats: packed input of a block that threads share, and a thread's products of a slice: both stay near
// the second-level cache.
constexpr int64_t kMostPacked = int64_t{1} << 19, kMostProducts = int64_t{1} << 16;
// Of a thread that computes apart, packed input and products of a block; of all threads, the filters.
constexpr int64_t kMostApart = int64_t{1} << 18, kMostFilters = int64_t{1} << 23;
// Of 1 x 1 filters, a block's pixels as they are read and as they are written, but no fewer groups than let a thread
// read all filters seldom.
constexpr int64_t kMostPixels = int64_t{1} << 16, kFewestPixelGroups = 16;
// Groups a thread from which on threads compute apart: with fewer, filters are read too often.
constexpr int64_t kFewestGroups = 4;
// Of a weight gradient: both packed inputs of a block, which stay in the last-level cache beside what else is there.
constexpr int64_t kMostGradientPacked = int64_t{1} << 21;
// Each block transforms the filters again, which takes a few percent of the products of so many tiles.
constexpr int64_t kFewestTiles = 64;

// The cost of a vector from memory: 20 GB/s of a core, as two share what a machine has, beside 117 GFLOP/s of its
// multiply-adds.
constexpr double kMemoryCost = 11.7;

// Costs in multiply-adds of vectors: of a vector of channels of a tile, into the transform and out of it, and of a
// vector of filters; of a direct convolution, per tap.
struct Costs {
    double input, output, filter;
};

Costs costs_of(Method method, const Shape& shape) {
    double taps = static_cast<double>(shape.taps());
    switch (method) {
        case Method::winograd4:
            return {450, 320, 170};
        case Method::winograd2:
            return {180, 90, 110};
        default:
            return {16 * taps, 20, 14 * taps};
    }
}

// A step of the micro-kernel loads two vectors of the panel, which takes as long as two rows' multiply-adds.
double step_cost(int64_t rows) { return static_cast<double>(2 * std::max<int64_t>(rows, 2)) + 0.5; }

int64_t depth_of(Method method, const Shape& shape, int64_t lanes) {
    if (method != Method::direct) return round_up(shape.channels, lanes);
    int64_t whole = shape.channels / kChunk, rest = shape.channels % kChunk;
    return whole * shape.taps() * kChunk + round_up(shape.taps() * rest, lanes);
}

// The cost of a panel's filters.
double filters_cost(const Shape& shape, const Plan& plan) {
    return 2 * costs_of(plan.method, shape).filter * static_cast<double>(shape.channels);
}

// The cost of the products and outputs of some groups and a panel.
double products_cost(const Shape& shape, const Plan& plan, int64_t groups) {
    double products = static_cast<double>(plan.depth * plan.points) * step_cost(plan.rows);
    double outputs = static_cast<double>(2 * plan.rows) * costs_of(plan.method, shape).output;
    return static_cast<double>(groups) * (products + outputs);
}

// The cost of the input of one block.
double input_cost(const Shape& shape, const Plan& plan, const Target& target) {
    int64_t vectors = plan.block * divide_up(shape.channels, target.lanes);
    return static_cast<double>(vectors) * costs_of(plan.method, shape).input;
}

// The cost of one block's filters, products and outputs, divided into parts on the busiest thread.
double panels_cost(const Shape& shape, const Plan& plan, int64_t parts, const Target& target) {
    double part = filters_cost(shape, plan) + products_cost(shape, plan, divide_up(plan.block / plan.rows, parts));
    return static_cast<double>(divide_up(plan.panels * parts, target.threads)) * part;
}

// The cost of all arithmetic on the busiest thread.
double arithmetic_cost(const Shape& shape, const Plan& plan, const Target& target) {
    double input = input_cost(shape, plan, target), threads = static_cast<double>(target.threads);
    if (!plan.apart) {
        double block = input / threads + panels_cost(shape, plan, plan.panel_parts, target);
        return static_cast<double>(plan.blocks) * block;
    }
    double panels = static_cast<double>(plan.panels);
    double block = input + panels * products_cost(shape, plan, plan.block / plan.rows);
    double filters = static_cast<double>(divide_up(plan.panels, target.threads)) * filters_cost(shape, plan);
    return static_cast<double>(divide_up(plan.blocks, target.threads)) * block + filters;
}

// The cost of reading all packed filters from memory, on each of the threads that share them.
double memory_cost(const Plan& plan, const Target& target) {
    int64_t vectors = plan.panels * panel_size(plan, target.panel()) / target.lanes;
    return static_cast<double>(vectors) * kMemoryCost / static_cast<double>(target.threads);
}

// In a network every layer finds the filters of others in the caches. Reading and arithmetic overlap for the most part.
double cost(const Shape& shape, const Plan& plan, const Target& target) {
    double arithmetic = arithmetic_cost(shape, plan, target), memory = memory_cost(plan, target);
    return std::max(arithmetic, memory) + 0.35 * std::min(arithmetic, memory);
}

// Groups of the largest block that a thread computes apart.
int64_t most_groups(const Shape& shape, const Plan& plan, int64_t panel) {
    if (shape.taps() == 1) {
        return std::max(kMostPixels / ((shape.channels + shape.outputs) * plan.rows), kFewestPixelGroups);
    }
    return std::max<int64_t>(kMostApart / (plan.points * (plan.depth + panel) * plan.rows), 1);
}

bool serves(const Shape& shape, Method method) {
    return method == Method::direct || (shape.kernel_height == 3 && shape.kernel_width == 3 && shape.stride == 1);
}

// Sets groups and blocks. Threads compute blocks apart where there are enough groups for them and all packed filters
// fit the workspace: such a block and its products stay in a core's cache, and no thread waits for another.
void divide_tiles(const Shape& shape, const Target& target, Plan& plan) {
    int64_t tiles = plan.tiles(shape), panel = target.panel();
    plan.rows = divide_up(tiles, divide_up(tiles, target.most_rows));
    int64_t groups = divide_up(tiles, plan.rows);
    plan.apart = groups >= kFewestGroups * target.threads && plan.panels * panel_size(plan, panel) <= kMostFilters;
    if (plan.apart) {
        int64_t blocks = divide_up(groups, most_groups(shape, plan, panel));
        plan.blocks = std::min(round_up(blocks, target.threads), groups);
        plan.block = divide_up(groups, plan.blocks) * plan.rows;
        plan.slice = plan.block / plan.rows;
        return;
    }
    plan.blocks = divide_up(tiles, std::max(kMostPacked / (plan.points * plan.depth), kFewestTiles));
    int64_t block = divide_up(tiles, plan.blocks);
    plan.rows = divide_up(block, divide_up(block, target.most_rows));
    plan.blocks = std::min(plan.blocks, divide_up(tiles, plan.rows));
    plan.block = divide_up(divide_up(tiles, plan.rows), plan.blocks) * plan.rows;
    plan.slice = std::max<int64_t>(kMostProducts / (plan.points * plan.rows * panel), 1);
    plan.slice = std::min(plan.slice, plan.block / plan.rows);
}

}  // namespace

Plan plan_of(const Shape& shape, Method method, const Target& target) {
    Plan plan{};
    plan.method = method;
    plan.tile = method == Method::winograd4 ? 4 : method == Method::winograd2 ? 2 : 1;
    plan.points = method == Method::direct ? 1 : (plan.tile + 2) * (plan.tile + 2);
    plan.tile_rows = divide_up(shape.out_height, plan.tile);
    plan.tile_columns = divide_up(shape.out_width, plan.tile);
    plan.depth = depth_of(method, shape, target.lanes);
    plan.panels = divide_up(shape.outputs, target.panel());

    divide_tiles(shape, target, plan);
    plan.panel_parts = plan.input_parts = 1;
    if (plan.apart) return plan;
    int64_t most_parts = std::min(target.threads, plan.block / plan.rows);
    for (int64_t parts = 2; parts <= most_parts; ++parts) {
        double before = panels_cost(shape, plan, plan.panel_parts, target);
        if (panels_cost(shape, plan, parts, target) < before) plan.panel_parts = parts;
    }
    int64_t chunks = method == Method::direct ? 1 : divide_up(shape.channels, kChunk);
    plan.input_parts = std::min(divide_up(target.threads, chunks), plan.block);
    return plan;
}

Method choose(const Shape& shape, Method method, const Target& target) {
    if (method != Method::fastest && method != Method::accurate) return method;
    Method best = Method::direct;
    double least = cost(shape, plan_of(shape, best, target), target);
    for (Method other : {Method::winograd2, Method::winograd4}) {
        if (!serves(shape, other) || (other == Method::winograd4 && method == Method::accurate)) continue;
        double found = cost(shape, plan_of(shape, other, target), target);
        if (found < least) {
            best = other;
            least = found;
        }
    }
    return best;
}

Plan gradient_plan(const Shape& shape, Method method, const Target& target) {
    Plan plan{};
    auto set_method = [&](Method chosen, int64_t tile) {
        plan.method = chosen;
        plan.tile = tile;
        plan.points = (tile + 2) * (tile + 2);
        plan.tile_rows = divide_up(shape.out_height, tile);
        plan.tile_columns = divide_up(shape.out_width, tile);
        return plan.points * plan.tiles(shape);
    };
    int64_t two = set_method(Method::winograd2, 2), four = set_method(Method::winograd4, 4);
    bool accurate = method == Method::winograd2 || method == Method::accurate;
    if (accurate || (method != Method::winograd4 && two < four)) set_method(Method::winograd2, 2);

    plan.depth = round_up(shape.channels, target.lanes);
    plan.panels = divide_up(shape.outputs, target.panel());
    int64_t tiles = plan.tiles(shape), floats = plan.points * (plan.depth + plan.panels * target.panel());
    int64_t blocks = divide_up(tiles, std::max(kMostGradientPacked / floats, kFewestTiles));
    plan.block = round_up(divide_up(tiles, blocks), kFewestTiles);
    plan.input_parts = 1;
    return plan;
}

int64_t packed_size(const Plan& plan) { return plan.points * plan.plane(); }

int64_t input_scratch(const Shape& shape, const Plan& plan) {
    if (plan.method == Method::direct) return shape.taps() * kChunk + kChunk;
    return (plan.tile + 2) * (plan.tile_columns * plan.tile + 2) * kChunk;
}

}  // namespace dd::conv2d
