// Divides GroupNorm's work into tiles by the shape alone: any number of threads sums the same tiles in the same order,
// and so computes the same bits.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dd::group_norm {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some channels of some pixels that are dense in memory and read at once.
struct Tile : Run {
    int64_t first_channel, channels;  // first_channel is counted within the unit
    int64_t pixels, part;             // part is the index of the tile's range of pixels
};

// The smallest independent piece of work: one group of one sample in a contiguous tensor, all groups of one sample
// where channels are last.
struct Unit {
    int64_t sample, first_group, first_channel;
};

struct Tiling {
    int64_t samples, channels, pixels, groups;
    bool channels_last;
    int64_t tile_channels, tile_pixels;
    // Derived from the fields above; stored because each takes a division and is read for every tile.
    int64_t group_channels, unit_groups, unit_channels, sample_units, parts, tiles;

    int64_t units() const { return samples * sample_units; }
    // Whether a unit and its gradients are larger than an L2 cache, so that kernels visit it in the order of memory.
    bool streams() const { return unit_channels * pixels > 98304; }
    int64_t tile_elements() const { return tile_channels * tile_pixels; }

    Unit unit(int64_t index) const {
        int64_t sample = index / sample_units, first_group = (index - sample * sample_units) * unit_groups;
        return {sample, first_group, first_group * group_channels};
    }

    Tile tile(const Unit& unit, int64_t index) const {
        int64_t row = parts == 1 ? index : index / parts;
        Tile tile{};
        tile.part = index - row * parts;
        tile.first_channel = row * tile_channels;
        int64_t first_pixel = tile.part * tile_pixels;
        int64_t left = unit_channels - tile.first_channel, pixels_left = pixels - first_pixel;
        tile.channels = left < tile_channels ? left : tile_channels;
        tile.pixels = pixels_left < tile_pixels ? pixels_left : tile_pixels;
        tile.sample = unit.sample;
        int64_t first_channel = unit.first_channel + tile.first_channel;
        tile.offset = channels_last ? first_pixel * channels : first_channel * pixels + first_pixel;
        tile.elements = tile.channels * tile.pixels;
        return tile;
    }
};

// Chooses tiles that stay in the L1 cache while they are read twice; where channels are last, in L2, as a tile has all
// channels, and enough pixels to make up for the sums over a group's channels.
inline Tiling make_tiling(int64_t samples, int64_t channels, int64_t pixels, int64_t groups, bool channels_last) {
    Tiling t{samples, channels, pixels, groups, channels_last};
    t.group_channels = channels / groups;
    t.unit_groups = channels_last ? groups : 1;
    t.unit_channels = channels_last ? channels : t.group_channels;
    t.sample_units = channels_last ? 1 : groups;
    if (channels_last) {
        constexpr int64_t elements = 4096, fewest = 64, most = 128;
        t.tile_channels = channels;
        t.tile_pixels = elements / channels;
        if (t.tile_pixels < fewest) t.tile_pixels = fewest;
        if (t.tile_pixels > most) t.tile_pixels = most;
        if (t.tile_pixels > pixels) t.tile_pixels = pixels;
    } else {
        constexpr int64_t elements = 2048;
        t.tile_pixels = pixels < elements ? pixels : elements;
        t.tile_channels = pixels < elements ? elements / pixels : 1;
        if (t.tile_channels > t.group_channels) t.tile_channels = t.group_channels;
    }
    t.parts = ceil_div(pixels, t.tile_pixels);
    t.tiles = t.parts * ceil_div(t.unit_channels, t.tile_channels);
    return t;
}

}  // namespace dd::group_norm
