// What a call of attention carries, and how its work is divided. Independent of the instruction set.
#pragma once

#include "common/layout.h"
#include "common/sizes.h"

namespace dd::attention {

// Vectors [samples][heads][tokens], each dense in memory.
struct Tokens {
    const void* data;
    int64_t sample_stride, head_stride, token_stride;
    DType dtype;
};

// Each head of each sample: `queries` vectors of `depth` numbers, `keys` of as many, each with a value of `outputs`.
struct Shape {
    int64_t samples, heads, queries, keys, depth, outputs;

    int64_t all_heads() const { return samples * heads; }
};

// Elements between two rows of packed values, so that rows start in different cache sets.
constexpr int64_t kRowGap = 16;

// Keys whose scores are computed before their values are read: the scores of a panel of queries stay in the L1 cache,
// the packed keys and values in the L2 cache.
constexpr int64_t kMostKeys = 256, kBlockElements = 1 << 16;

// Panels of queries that meet a block of keys before the next block is read, where those of a head are more than an L2
// cache holds.
constexpr int64_t kGroup = 4, kCachedElements = 1 << 17;

// Rows that the micro-kernel of any instruction set multiplies at most.
constexpr int64_t kMostProducts = 8;

// Rows of keys and values that a thread packs at a time.
constexpr int64_t kPiece = 64;

// How the work is divided: by heads, within a head by groups of panels of queries. A group meets the keys by blocks.
struct Plan {
    int64_t lanes, panel;
    int64_t depth, values;    // lengths of a packed key and of a packed row of values
    int64_t rows;             // packed rows of a head: its keys, filled up to whole vectors
    int64_t head_keys, head;  // elements of a head's packed keys, and of these and its values
    int64_t block;            // keys of a block
    int64_t group, groups;    // panels of a group, and groups of a head

    Plan(const Shape& shape, int64_t lanes)
        : lanes(lanes),
          panel(2 * lanes),
          depth(round_up(shape.depth, lanes)),
          values(round_up(shape.outputs, lanes) + kRowGap),
          rows(round_up(shape.keys, lanes)),
          head_keys(rows * depth),
          head(head_keys + rows * values),
          block(kMostKeys),
          group(head > kCachedElements ? kGroup : 1),
          groups(divide_up(shape.queries, panel * group)) {
        while (block > panel && block * depth > kBlockElements) block /= 2;
    }

    int64_t pieces() const { return divide_up(rows, kPiece); }
};

// Where the parts of a thread's workspace begin, in floats: the scores of a block of keys, the weights made of them,
// the products of a group of rows; then of each panel its queries, the state of its softmax and the sums of values.
struct Scratch {
    int64_t weights, products, panels, softmax, sums, panel, size;

    Scratch(const Shape& shape, const Plan& plan)
        : weights(plan.block * plan.panel),
          products(weights + plan.block * plan.panel),
          panels(products + kMostProducts * plan.panel),
          softmax(plan.depth * plan.panel),
          sums(softmax + 3 * plan.panel),
          panel(sums + round_up(shape.outputs, plan.lanes) * plan.panel),
          size(panels + plan.group * panel) {}
};

struct Arguments {
    Shape shape;
    Tokens q, k, v;
    float scale;
    Operand y;  // [samples][queries][heads][outputs], dense
};

}  // namespace dd::attention
