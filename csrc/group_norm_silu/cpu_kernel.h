#include "group_norm_silu/cpu_loops.h"

namespace dd::DD_ISA {

using group_norm::Forward;
using group_norm::Moments;

// Returns count, mean and sum of squared deviations of values, given sums of (value - centre).
DD_INLINE Moments moments_of(const Deviations& d, double count, double centre) {
    return {count, centre + d.sum / count, d.squares - d.sum * d.sum / count};
}

// Returns the rounding error of centre - pre_shift.
DD_INLINE double rounding(float centre, float pre_shift) {
    return static_cast<double>(centre - pre_shift) + pre_shift - centre;
}

// Estimates the mean of x + pre_shift from a vector at each of four positions.
DD_INLINE float estimate_mean(const float* x, int64_t rows, int64_t length, const float* pre_shift) {
    constexpr int positions = 4;
    int64_t lanes = length < kLanes ? length : kLanes, apart = length < positions * kLanes ? 0 : length / positions;
    Vec total{};
    float shifts = 0;
    for (int64_t i = 0; i < positions; ++i) {
        int64_t row = i * rows / positions;
        total += load(x + row * length + i * apart, lanes);
        if (pre_shift != nullptr) shifts += pre_shift[row];
    }
    return sum(total) / static_cast<float>(positions * lanes) + shifts / positions;
}

// Computes what row_moments() does, and accounts for the rounding error of each row's centre.
DD_INLINE Moments moments_by_row(const float* x, int64_t rows, int64_t length, const float* pre_shift, float centre) {
    Moments all{};
    for (int64_t row = 0; row < rows; ++row) {
        Deviations d = row_deviations(x + row * length, 1, length, pre_shift + row, centre);
        Moments one = moments_of(d, static_cast<double>(length), centre + rounding(centre, pre_shift[row]));
        if (row == 0) {
            all = one;
        } else {
            all.merge(one);
        }
    }
    return all;
}

// Computes the moments of x + pre_shift over rows of one group; pre_shift is null or has one value per row. Makes one
// pass about an estimate of the mean, and where that was far off a second one, about the mean that the first found.
DD_INLINE Moments row_moments(const float* x, int64_t rows, int64_t length, const float* pre_shift) {
    double count = static_cast<double>(rows * length);
    float centre = estimate_mean(x, rows, length, pre_shift);
    Deviations d = row_deviations(x, rows, length, pre_shift, centre);
    if (d.off_centre(count)) {
        centre += static_cast<float>(d.sum / count);
        d = row_deviations(x, rows, length, pre_shift, centre);
    }
    if (pre_shift == nullptr) return moments_of(d, count, centre);
    double away = 0, squares = 0;
    for (int64_t row = 0; row < rows; ++row) {
        double here = rounding(centre, pre_shift[row]);
        away += here;
        squares += here * here;
    }
    Moments moments = moments_of(d, count, centre + away / static_cast<double>(rows));
    // The errors show in the variance where the shifts, of dozens of deviations, cancel means of x.
    bool shows = squares * static_cast<double>(length) > 0x1p-42 * moments.m2;
    return shows ? moments_by_row(x, rows, length, pre_shift, centre) : moments;
}

DD_INLINE double sum_of(const float* values, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[i];
    return total;
}

constexpr int64_t kSomePixels = 4;

// Computes sums[c] of x[pixel][c] over kSomePixels pixels, evenly spaced.
DD_INLINE void sum_some_pixels(const float* x, int64_t pixels, int64_t channels, float* sums) {
    for_vectors(channels, [&](int64_t c, int64_t lanes) {
        Vec total{};
        for (int64_t i = 0; i < kSomePixels; ++i) total += load(x + i * pixels / kSomePixels * channels + c, lanes);
        store(sums + c, lanes, total);
    });
}

// Sets centres[c] so that x - centres[c] is x + pre_shift - centre.
DD_INLINE void set_centres(float centre, const float* pre_shift, int64_t channels, float* centres) {
    for (int64_t c = 0; c < channels; ++c) centres[c] = pre_shift == nullptr ? centre : centre - pre_shift[c];
}

// Returns the deviations of all channels from the centre, given those of each channel from its own rounded centre.
DD_INLINE Deviations join_channels(float centre, const float* pre_shift, int64_t channels, int64_t pixels,
                                   const float* sums, const float* squares) {
    Deviations d{sum_of(sums, channels), sum_of(squares, channels)};
    for (int64_t c = 0; c < channels && pre_shift != nullptr; ++c) {
        double away = rounding(centre, pre_shift[c]), all_away = away * static_cast<double>(pixels);
        d.sum += all_away;
        d.squares += away * (2.0 * sums[c] + all_away);
    }
    return d;
}

// Computes, for every group, the moments of x + pre_shift over x [pixels][channels], as row_moments() does; scratch
// holds 3 floats per channel.
DD_INLINE void pixel_moments(const float* x, int64_t pixels, int64_t channels, int64_t groups, const float* pre_shift,
                             float* scratch, Moments* out) {
    float *sums = scratch, *squares = sums + channels, *centres = squares + channels;
    int64_t width = channels / groups;
    double count = static_cast<double>(pixels * width);
    auto shifts = [&](int64_t g) { return pre_shift == nullptr ? nullptr : pre_shift + g * width; };
    sum_some_pixels(x, pixels, channels, sums);
    for (int64_t g = 0; g < groups; ++g) {
        double total = sum_of(sums + g * width, width) / kSomePixels;
        if (pre_shift != nullptr) total += sum_of(shifts(g), width);
        out[g].mean = total / static_cast<double>(width);
    }
    bool off_centre = true;
    for (int pass = 0; off_centre && pass < 2; ++pass) {
        for (int64_t g = 0; g < groups; ++g) {
            set_centres(static_cast<float>(out[g].mean), shifts(g), width, centres + g * width);
        }
        sum_deviations(x, pixels, channels, centres, sums, squares);
        off_centre = false;
        for (int64_t g = 0; g < groups; ++g) {
            float centre = static_cast<float>(out[g].mean);
            Deviations d = join_channels(centre, shifts(g), width, pixels, sums + g * width, squares + g * width);
            out[g] = moments_of(d, count, centre);
            off_centre = off_centre || d.off_centre(count);
        }
    }
}

void group_norm_reduce(const Forward& a, const Unit& unit, int64_t index, Moments* moments, float* scratch) {
    const group_norm::Tiling& tiling = a.tiling;
    group_norm::Tile tile = tiling.tile(unit, index);
    const float* x = read_tile(a.x, tile, scratch + 3 * tiling.unit_channels);
    const float* pre_shift = a.options.pre_shift;
    if (pre_shift != nullptr) {
        pre_shift += tile.sample * tiling.channels + unit.first_channel + tile.first_channel;
    }
    Moments* out = moments + index * tiling.unit_groups;
    if (tiling.channels_last) {
        pixel_moments(x, tile.pixels, tiling.channels, tiling.groups, pre_shift, scratch, out);
    } else if (pre_shift == nullptr) {
        *out = row_moments(x, 1, tile.elements, nullptr);
    } else {
        *out = row_moments(x, tile.channels, tile.pixels, pre_shift);
    }
}

// Merges the moments of a unit's tiles and computes its coefficients [3][unit_channels]: centre, gain and offset.
void group_norm_finish(const Forward& a, const Unit& unit, const Moments* moments, float* coefficients) {
    const group_norm::Tiling& tiling = a.tiling;
    int64_t groups = tiling.unit_groups;
    for (int64_t g = 0; g < groups; ++g) {
        Moments all = moments[g];
        for (int64_t i = 1; i < tiling.tiles; ++i) all.merge(moments[i * groups + g]);
        double variance = all.m2 / all.count;
        if (variance < 0) variance = 0;  // rounding can make it negative; NaN stays
        // An infinite variance, of squares beyond float32, makes NaN: 1 / inf would make y the bias.
        double rstd = 1.0 / __builtin_sqrt(variance + a.options.eps) + (variance - variance);
        int64_t at = unit.sample * tiling.groups + unit.first_group + g;
        if (a.mean != nullptr) {
            a.mean[at] = static_cast<float>(all.mean);
            a.rstd[at] = static_cast<float>(rstd);
        }
        auto map = [&](const ChannelOptions<double>& o, auto& values, int64_t i) {
            store_affine(affine(all.mean, rstd, o), values, i);
        };
        set_coefficients<3>(a.options, tiling, unit, g, coefficients, map);
    }
}

// Maps rows of one or two vectors, four vectors at a time; returns how many rows it has mapped.
template <class Activation, int vectors>
DD_INLINE int64_t map_short_rows(const float* x, float* y, int64_t rows, const float* coefficients, int64_t stride) {
    constexpr int64_t some = 4 / vectors;
    int64_t row = 0;
    for (; row + some <= rows; row += some, x += 4 * kLanes, y += 4 * kLanes) {
        Vec z[4];
        for (int j = 0; j < 4; ++j) {
            z[j] = normalised(x + j * kLanes, kLanes, splat_affine(coefficients + row + j / vectors, stride));
        }
        activate<Activation>(z);
        for (int j = 0; j < 4; ++j) store(y + j * kLanes, z[j]);
    }
    return row;
}

template <class Activation>
DD_INLINE void map_rows(const float* x, float* y, int64_t rows, int64_t length, const float* coefficients,
                        int64_t stride) {
    int64_t row = 0;
    if (length == kLanes) row = map_short_rows<Activation, 1>(x, y, rows, coefficients, stride);
    if (length == 2 * kLanes) row = map_short_rows<Activation, 2>(x, y, rows, coefficients, stride);
    for (x += row * length, y += row * length; row < rows; ++row, x += length, y += length) {
        const AffineVec map = splat_affine(coefficients + row, stride);
        for_blocks(length, [&](auto block, int64_t i, int64_t lanes) DD_INLINE_LAMBDA {
            Vec z[block.count];
            for (int j = 0; j < block.count; ++j) z[j] = normalised(x + i + j * kLanes, lanes, map);
            activate<Activation>(z);
            for (int j = 0; j < block.count; ++j) store(y + i + j * kLanes, lanes, z[j]);
        });
    }
}

// Maps pixels that are in the cache: a few at a time, which share the values per channel.
template <class Activation>
DD_INLINE void map_pixels(const float* x, float* y, int64_t pixels, int64_t channels, const float* coefficients) {
    for_pixels<4>(pixels, false, [&](auto rows, int64_t pixel) DD_INLINE_LAMBDA {
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            AffineVec map = load_affine(coefficients + c, channels, left);
            int64_t at = pixel * channels + c;
            Vec z[rows.count];
            for (int r = 0; r < rows.count; ++r) z[r] = normalised(x + at + r * channels, left, map);
            activate<Activation>(z);
            for (int r = 0; r < rows.count; ++r) store(y + at + r * channels, left, z[r]);
        });
    });
}

// Maps the pixels of samples larger than L2, in the order of memory.
template <class Activation>
DD_INLINE void map_pixels_in_order(const float* x, float* y, int64_t pixels, int64_t channels,
                                   const float* coefficients) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, y += channels) {
        for_blocks(channels, [&](auto block, int64_t c, int64_t lanes) DD_INLINE_LAMBDA {
            Vec z[block.count];
            for (int j = 0; j < block.count; ++j) {
                int64_t at = c + j * kLanes;
                z[j] = normalised(x + at, lanes, load_affine(coefficients + at, channels, lanes));
            }
            activate<Activation>(z);
            for (int j = 0; j < block.count; ++j) store(y + c + j * kLanes, lanes, z[j]);
        });
    }
}

template <class Activation>
void map_tile(const Forward& a, const Unit& unit, int64_t index, const float* coefficients, float* scratch) {
    const group_norm::Tiling& tiling = a.tiling;
    group_norm::Tile tile = tiling.tile(unit, index);
    const float* x = read_tile(a.x, tile, scratch);
    float* y = output_tile(a.y, tile, scratch);  // x is read before y is written, block by block
    if (tiling.channels_last) {
        auto map = tiling.streams() ? map_pixels_in_order<Activation> : map_pixels<Activation>;
        map(x, y, tile.pixels, tiling.channels, coefficients);
    } else {
        map_rows<Activation>(x, y, tile.channels, tile.pixels, coefficients + tile.first_channel, tiling.unit_channels);
    }
    write_tile(a.y, tile, y);
}

void group_norm_map(const Forward& a, const Unit& unit, int64_t index, const float* coefficients, float* scratch) {
    Activations::visit(a.options.activation,
                       [&](auto activation) { map_tile<decltype(activation)>(a, unit, index, coefficients, scratch); });
}

}  // namespace dd::DD_ISA
