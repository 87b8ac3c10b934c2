#include <algorithm>

#include "conv2d/plan.h"

namespace dd::conv2d {
namespace {

// Workspace in floats: packed input of a block, and a thread's products of a slice: both stay near the second-level
// cache.
constexpr int64_t kMostPacked = int64_t{1} << 19, kMostProducts = int64_t{1} << 16;
// Of a weight gradient: both packed inputs of a block, which stay in the last-level cache.
constexpr int64_t kMostGradientPacked = int64_t{1} << 22;
// Each block transforms the filters again, which takes a few percent of the products of so many tiles.
constexpr int64_t kFewestTiles = 64;

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
            return {4 * taps, 8, 14 * taps};
    }
}

// A step of the micro-kernel loads two vectors of the panel, which takes as long as two rows' multiply-adds.
double step_cost(int64_t rows) { return static_cast<double>(2 * std::max<int64_t>(rows, 2)) + 0.5; }

int64_t depth_of(Method method, const Shape& shape, int64_t lanes) {
    if (method != Method::direct) return round_up(shape.channels, lanes);
    int64_t whole = shape.channels / kChunk, rest = shape.channels % kChunk;
    return whole * shape.taps() * kChunk + round_up(shape.taps() * rest, lanes);
}

// The cost of one block's filters, products and outputs, divided into parts on the busiest thread.
double panels_cost(const Shape& shape, const Plan& plan, int64_t parts, const Target& target) {
    Costs costs = costs_of(plan.method, shape);
    double groups = static_cast<double>(divide_up(divide_up(plan.block, plan.rows), parts));
    double depth = static_cast<double>(plan.depth * plan.points);
    double filters = 2 * costs.filter * static_cast<double>(shape.channels);
    double products = groups * depth * step_cost(plan.rows);
    double outputs = groups * static_cast<double>(2 * plan.rows) * costs.output;
    return static_cast<double>(divide_up(plan.panels * parts, target.threads)) * (filters + products + outputs);
}

double cost(const Shape& shape, const Plan& plan, const Target& target) {
    double blocks = static_cast<double>(divide_up(plan.tiles(shape), plan.block));
    double vectors = static_cast<double>(plan.block * divide_up(shape.channels, target.lanes));
    double input = vectors * costs_of(plan.method, shape).input / static_cast<double>(target.threads);
    return blocks * (input + panels_cost(shape, plan, plan.panel_parts, target));
}

bool serves(const Shape& shape, Method method) {
    return method == Method::direct || (shape.kernel_height == 3 && shape.kernel_width == 3 && shape.stride == 1);
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

    int64_t tiles = plan.tiles(shape);
    int64_t blocks = divide_up(tiles, std::max(kMostPacked / (plan.points * plan.depth), kFewestTiles));
    int64_t block = divide_up(tiles, blocks);
    plan.rows = divide_up(block, divide_up(block, target.most_rows));
    plan.block = round_up(block, plan.rows);
    plan.slice = std::max<int64_t>(kMostProducts / (plan.points * plan.rows * target.panel()), 1);
    plan.slice = std::min(plan.slice, plan.block / plan.rows);

    plan.panel_parts = 1;
    int64_t most_parts = std::min(target.threads, divide_up(plan.block, plan.rows));
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
