// How GroupNorm's work is cut, from the shape alone: the same pieces, and sums over them in the same
// order, on any number of threads. Hence the same bits.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dd::group_norm {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is read at once: some channels of some pixels, dense in memory.
struct Piece : Run {
    int64_t first_channel, channels;  // counted in the unit
    int64_t pixels, part;             // part: which of the cut's parts of the pixels
};

// A unit shares nothing with the others: one group of one sample in a contiguous tensor, all groups
// of one sample where channels are last.
struct Unit {
    int64_t sample, first_group, first_channel;
};

struct Cut {
    int64_t samples, channels, pixels, groups;
    bool channels_last;
    int64_t piece_channels, piece_pixels;
    // These follow from the above; each is a division, and they are asked for all the time.
    int64_t group_channels, unit_groups, unit_channels, sample_units, parts, pieces;

    int64_t units() const { return samples * sample_units; }
    // Whether a unit with its gradients outgrows an L2 cache: it should then be visited in the order of memory.
    bool streams() const { return unit_channels * pixels > 98304; }
    int64_t piece_elements() const { return piece_channels * piece_pixels; }

    Unit unit(int64_t index) const {
        int64_t sample = index / sample_units, first_group = (index - sample * sample_units) * unit_groups;
        return {sample, first_group, first_group * group_channels};
    }

    Piece piece(const Unit& unit, int64_t index) const {
        int64_t row = parts == 1 ? index : index / parts;
        Piece p{};
        p.part = index - row * parts;
        p.first_channel = row * piece_channels;
        int64_t first_pixel = p.part * piece_pixels;
        int64_t left = unit_channels - p.first_channel, pixels_left = pixels - first_pixel;
        p.channels = left < piece_channels ? left : piece_channels;
        p.pixels = pixels_left < piece_pixels ? pixels_left : piece_pixels;
        p.sample = unit.sample;
        int64_t first_channel = unit.first_channel + p.first_channel;
        p.offset = channels_last ? first_pixel * channels : first_channel * pixels + first_pixel;
        p.elements = p.channels * p.pixels;
        return p;
    }
};

// Pieces that stay in the L1 cache while they are read twice; where channels are last, in L2, as a
// piece has all channels and enough pixels to make up for the sums over a group's channels.
inline Cut cut(int64_t samples, int64_t channels, int64_t pixels, int64_t groups, bool channels_last) {
    Cut c{samples, channels, pixels, groups, channels_last};
    c.group_channels = channels / groups;
    c.unit_groups = channels_last ? groups : 1;
    c.unit_channels = channels_last ? channels : c.group_channels;
    c.sample_units = channels_last ? 1 : groups;
    if (channels_last) {
        constexpr int64_t elements = 4096, fewest = 64, most = 128;
        c.piece_channels = channels;
        c.piece_pixels = elements / channels;
        if (c.piece_pixels < fewest) c.piece_pixels = fewest;
        if (c.piece_pixels > most) c.piece_pixels = most;
        if (c.piece_pixels > pixels) c.piece_pixels = pixels;
    } else {
        constexpr int64_t elements = 2048;
        c.piece_pixels = pixels < elements ? pixels : elements;
        c.piece_channels = pixels < elements ? elements / pixels : 1;
        if (c.piece_channels > c.group_channels) c.piece_channels = c.group_channels;
    }
    c.parts = ceil_div(pixels, c.piece_pixels);
    c.pieces = c.parts * ceil_div(c.unit_channels, c.piece_channels);
    return c;
}

// What both passes are told beside their tensors; [C] or [N, C], null where absent.
struct Options {
    const float *weight, *bias, *pre_shift, *scale, *shift;
    double eps;
    bool silu;
};

}  // namespace dd::group_norm
