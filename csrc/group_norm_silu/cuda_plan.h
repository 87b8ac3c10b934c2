// Chooses the kernels of GroupNorm by shape, layout, dtype and chip alone.
//
// A tile is the part of x whose statistics are computed together: one group of a contiguous tensor, or a block of
// channels (whole groups) of one sample where channels are last. It is read in rows. It is resident in registers
// between the statistics and the output, so that it is read once, by one warp, one block, or one cluster of blocks; a
// larger tile is split over blocks and read twice, the second time from L2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "common/cuda_chip.h"
#include "common/layout.h"

namespace dd::cuda {

constexpr int kNormThreads = 256;  // of a block
constexpr int kNormWarps = 4;      // of a block in which every warp has a group of its own
constexpr int kWarpLanes = 32;
constexpr int kMostResidentPerWarp = 8;  // 16-byte vectors that a thread keeps in registers

constexpr int kMostTileChannels = 1024;  // whose sums and statistics fit the shared memory of a block
static_assert(kMostTileChannels <= 4 * kNormThreads, "a thread has a vector of every row");

enum class Direction { forward, backward };
enum class Regime { warp, resident, split };
enum class Access { contiguous, channels_last, scalar };  // scalar: element by element, for any shape

struct NormShape {
    int64_t samples, channels, pixels, groups;
    bool channels_last, aligned;  // aligned: every tensor starts at a multiple of 16 bytes
    DType dtype;
    int64_t x_channels;  // the first channels, those of x; the others, if any, are those of skip

    DD_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
    int64_t group_elements() const { return group_channels() * pixels; }
    DD_HOST_DEVICE int64_t element_bytes() const { return dtype == DType::float32 ? 4 : 2; }
    DD_HOST_DEVICE int64_t vector() const { return 16 / element_bytes(); }
};

struct NormPlan {
    Regime regime;
    Access access;
    int resident;  // vectors in a thread's registers: 2, 4 or the most that fit
    int cluster;   // blocks that share a tile
    int splits;    // blocks that a tile is split over
    int tile_channels, tile_groups, group_channels;
    int columns;        // of a tile, in vectors; 1 unless channels are last
    int64_t rows;       // of a tile, in vectors
    int64_t rows_each;  // of a block
    int64_t tiles;
    int64_t wave_tiles;  // tiles whose second reading comes from L2

    int tiles_per_sample(const NormShape& shape) const { return static_cast<int>(shape.channels / tile_channels); }
};

// 16-byte vectors that a thread of a block can keep in registers; backward, of x and of dy each.
constexpr int most_resident(DType dtype, Access access, Direction direction) {
    if (direction == Direction::backward) return 4;
    // The exact exponential of float32, and the parameters of eight channels, need registers of their own.
    return dtype == DType::float32 || access == Access::channels_last ? 8 : 12;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

// Vectors per thread that hold `rows` rows of `columns`, or 0 if a block has too few threads.
inline int64_t vectors_per_thread(int64_t rows, int64_t columns) {
    int64_t rows_at_once = kNormThreads / columns;
    return rows_at_once == 0 ? 0 : ceil_div(rows, rows_at_once);
}

// Returns whether each of `blocks` blocks has rows, where all but the last have the same number: an empty block has no
// mean.
inline bool none_is_empty(int64_t rows, int64_t blocks) { return (blocks - 1) * ceil_div(rows, blocks) < rows; }

// The smallest cluster that holds a tile in registers, or 0.
inline int fitting_cluster(int64_t rows, int64_t columns, int most_resident, const Chip& chip) {
    for (int cluster = 1; cluster <= chip.max_cluster; cluster *= 2) {
        int64_t vectors = vectors_per_thread(ceil_div(rows, cluster), columns);
        if (vectors > 0 && vectors <= most_resident && none_is_empty(rows, cluster)) return cluster;
    }
    return 0;
}

// Channels of a tile where channels are last; 0 if 16-byte vectors cannot cover whole groups.
// Rows of 128 bytes use what DRAM fetches; narrower ones if only they fit; wider ones for small images.
inline int64_t block_channels(const NormShape& shape, int most_resident, const Chip& chip) {
    constexpr int64_t good_row_bytes = 128, least_row_bytes = 32, good_block_bytes = 16 << 10;
    int64_t group = shape.group_channels(), vector = shape.vector();
    int64_t unit = group / greatest_common_divisor(group, vector) * vector;
    if (shape.channels % unit != 0) return 0;
    int64_t best = 0;
    for (int64_t channels = unit; channels <= std::min<int64_t>(shape.channels, kMostTileChannels); channels += unit) {
        if (shape.channels % channels != 0) continue;
        int64_t row_bytes = channels * shape.element_bytes();
        int cluster = fitting_cluster(shape.pixels, channels / vector, most_resident, chip);
        if (cluster == 0 || (row_bytes < least_row_bytes && channels < shape.channels)) continue;
        bool fills_chip = shape.samples * (shape.channels / channels) >= 4 * chip.sm_count;
        bool wider_is_better = best * shape.element_bytes() < good_row_bytes ||
                               (cluster == 1 && fills_chip && shape.pixels * row_bytes <= 2 * good_block_bytes);
        if (best == 0 || wider_is_better) best = channels;
    }
    return best;
}

inline NormPlan tiled(const NormShape& shape, Regime regime, Access access, int64_t tile_channels) {
    bool last = access == Access::channels_last;
    int64_t vector = access == Access::scalar ? 1 : shape.vector();
    NormPlan plan{};
    plan.regime = regime;
    plan.access = access;
    plan.cluster = plan.splits = 1;
    plan.tile_channels = static_cast<int>(tile_channels);
    plan.group_channels = static_cast<int>(shape.group_channels());
    plan.tile_groups = plan.tile_channels / plan.group_channels;
    plan.columns = last ? static_cast<int>(tile_channels / vector) : 1;
    plan.rows = plan.rows_each = last ? shape.pixels : shape.group_elements() / vector;
    plan.tiles = plan.wave_tiles = shape.samples * (shape.channels / tile_channels);
    return plan;
}

// Sets as many blocks to a tile as hold it in registers, and more while the chip is not full and every thread keeps two
// vectors.
inline void choose_cluster(NormPlan& plan, int most_resident, const Chip& chip) {
    plan.cluster = fitting_cluster(plan.rows, plan.columns, most_resident, chip);
    while (2 * plan.cluster <= chip.max_cluster && plan.tiles * plan.cluster < chip.sm_count &&
           vectors_per_thread(ceil_div(plan.rows, 2 * plan.cluster), plan.columns) >= 2 &&
           none_is_empty(plan.rows, 2 * plan.cluster)) {
        plan.cluster *= 2;
    }
    plan.rows_each = ceil_div(plan.rows, plan.cluster);
    int64_t needed = vectors_per_thread(plan.rows_each, plan.columns);
    plan.resident = needed <= 2 ? 2 : needed <= 4 ? 4 : most_resident;
}

inline NormPlan split_plan(const NormShape& shape, Access access, int64_t tile_channels, Direction direction,
                           const Chip& chip) {
    constexpr int64_t bytes_per_block = 64 << 10;
    // So many blocks let a tile of the size of L2 fill the chip. Backward takes fewer, since one thread adds up their
    // sums.
    const int64_t most_splits = direction == Direction::forward ? 512 : 128;
    NormPlan plan = tiled(shape, Regime::split, access, tile_channels);
    int64_t tile_bytes = tile_channels * shape.pixels * shape.element_bytes();
    int64_t splits = std::min({ceil_div(tile_bytes, bytes_per_block), most_splits, plan.rows});
    plan.rows_each = ceil_div(plan.rows, splits);
    plan.splits = static_cast<int>(ceil_div(plan.rows, plan.rows_each));  // none is empty
    plan.wave_tiles = std::max<int64_t>(1, std::min(plan.tiles, chip.l2_bytes * 2 / 5 / tile_bytes));
    return plan;
}

// Channels of a split tile where channels are last: the narrowest rows of 128 bytes that a block's threads span.
inline int64_t split_channels(const NormShape& shape) {
    constexpr int64_t good_row_bytes = 128;
    int64_t group = shape.group_channels(), vector = shape.vector();
    int64_t unit = group / greatest_common_divisor(group, vector) * vector;
    int64_t best = 0;
    for (int64_t channels = unit; channels <= std::min<int64_t>(shape.channels, kMostTileChannels); channels += unit) {
        if (shape.channels % channels != 0) continue;
        if (best * shape.element_bytes() < good_row_bytes) best = channels;
    }
    return best;
}

inline NormPlan plan_norm(NormShape shape, Direction direction, const Chip& chip) {
    constexpr int64_t most_rows = int64_t{1} << 28;
    if (shape.pixels == 1) shape.channels_last = true;  // the same bytes
    bool last = shape.channels_last;
    Access access = last ? Access::channels_last : Access::contiguous;
    int resident = most_resident(shape.dtype, access, direction);
    int64_t group = shape.group_channels(), vectors = shape.group_elements() / shape.vector();
    int64_t row = last ? shape.channels : shape.pixels;  // a vector is in one channel, or has one of each
    bool vectorised = shape.aligned && row % shape.vector() == 0 && vectors < most_rows && shape.pixels < most_rows &&
                      (!last || shape.x_channels % shape.vector() == 0);
    if (!vectorised || (last && split_channels(shape) == 0))
        return split_plan(shape, Access::scalar, group, direction, chip);

    int64_t tile_channels = last ? block_channels(shape, resident, chip) : group;
    if (tile_channels == 0) return split_plan(shape, access, split_channels(shape), direction, chip);
    NormPlan plan = tiled(shape, Regime::resident, access, tile_channels);
    if (!last && direction == Direction::forward && vectors <= kWarpLanes * kMostResidentPerWarp) {
        plan.regime = Regime::warp;
        plan.resident = vectors <= kWarpLanes * 2 ? 2 : kMostResidentPerWarp;
        return plan;
    }
    bool too_many_channels = direction == Direction::backward && tile_channels > kMostTileChannels;
    if (too_many_channels || fitting_cluster(plan.rows, plan.columns, resident, chip) == 0)
        return split_plan(shape, access, tile_channels, direction, chip);
    choose_cluster(plan, resident, chip);
    return plan;
}

// Returns the plan as the chip can run it; largest_cluster(plan) says how many blocks of its kernel can form a cluster.
template <class LargestCluster>
NormPlan plan_to_run(const NormShape& shape, Direction direction, Chip chip, const LargestCluster& largest_cluster) {
    for (;;) {
        const NormPlan plan = plan_norm(shape, direction, chip);
        if (plan.cluster == 1 || plan.cluster <= largest_cluster(plan)) return plan;
        chip.max_cluster = plan.cluster / 2;
    }
}

}  // namespace dd::cuda
