#include "group_norm_silu/cpu_blocks.h"

namespace dd::DD_ISA {

using group_norm::Forward;
using group_norm::Moments;

// Of so many values, from their deviations.
DD_INLINE Moments moments_of(const Deviations& d, double count, double centre) {
    return {count, centre + d.sum / count, d.squares - d.sum * d.sum / count};
}

// How far from centre it is that centre - pre_shift, as rounded, centres x + pre_shift.
DD_INLINE double rounding(float centre, float pre_shift) {
    return static_cast<double>(centre - pre_shift) + pre_shift - centre;
}

// Near the mean of x + pre_shift, as a rule: that of a vector from each of four places.
DD_INLINE float rough_mean(const float* x, int64_t rows, int64_t length, const float* pre_shift) {
    constexpr int places = 4;
    int64_t lanes = length < kLanes ? length : kLanes, apart = length < places * kLanes ? 0 : length / places;
    Vec total{};
    float shifts = 0;
    for (int64_t i = 0; i < places; ++i) {
        int64_t row = i * rows / places;
        total += load(x + row * length + i * apart, lanes);
        if (pre_shift != nullptr) shifts += pre_shift[row];
    }
    return sum(total) / static_cast<float>(places * lanes) + shifts / places;
}

// As row_moments(), with each row's own rounding.
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

// Of x + pre_shift over rows of one group; pre_shift is null or has one value per row. One pass, and a
// second, about the mean that the first found, where a few values were a bad sample of all.
DD_INLINE Moments row_moments(const float* x, int64_t rows, int64_t length, const float* pre_shift) {
    double count = static_cast<double>(rows * length);
    float centre = rough_mean(x, rows, length, pre_shift);
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
    // It shows in the variance of values that a shift of dozens of deviations brings together.
    bool shows = squares * static_cast<double>(length) > 0x1p-42 * moments.m2;
    return shows ? moments_by_row(x, rows, length, pre_shift, centre) : moments;
}

DD_INLINE double sum_of(const float* values, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[i];
    return total;
}

constexpr int64_t kSomePixels = 4;

// sums[c] of x[pixel][c] over a few pixels, spread over all of them.
DD_INLINE void sum_some_pixels(const float* x, int64_t pixels, int64_t channels, float* sums) {
    for_vectors(channels, [&](int64_t c, int64_t lanes) {
        Vec total{};
        for (int64_t i = 0; i < kSomePixels; ++i) total += load(x + i * pixels / kSomePixels * channels + c, lanes);
        store(sums + c, lanes, total);
    });
}

// centres[c] that take the centre from x + pre_shift.
DD_INLINE void set_centres(float centre, const float* pre_shift, int64_t channels, float* centres) {
    for (int64_t c = 0; c < channels; ++c) centres[c] = pre_shift == nullptr ? centre : centre - pre_shift[c];
}

// Of all channels less the centre, from those of each less its own, as rounded.
DD_INLINE Deviations less_centre(float centre, const float* pre_shift, int64_t channels, int64_t pixels,
                                 const float* sums, const float* squares) {
    Deviations d{sum_of(sums, channels), sum_of(squares, channels)};
    for (int64_t c = 0; c < channels && pre_shift != nullptr; ++c) {
        double away = rounding(centre, pre_shift[c]), all_away = away * static_cast<double>(pixels);
        d.sum += all_away;
        d.squares += away * (2.0 * sums[c] + all_away);
    }
    return d;
}

// Of x + pre_shift over pixels [pixels][channels], for every group, as row_moments(); scratch holds 3 floats
// per channel.
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
    bool again = true;
    for (int pass = 0; again && pass < 2; ++pass) {
        for (int64_t g = 0; g < groups; ++g) {
            set_centres(static_cast<float>(out[g].mean), shifts(g), width, centres + g * width);
        }
        sum_deviations(x, pixels, channels, centres, sums, squares);
        again = false;
        for (int64_t g = 0; g < groups; ++g) {
            float centre = static_cast<float>(out[g].mean);
            Deviations d = less_centre(centre, shifts(g), width, pixels, sums + g * width, squares + g * width);
            out[g] = moments_of(d, count, centre);
            again = again || d.off_centre(count);
        }
    }
}

void group_norm_reduce(const Forward& a, const Unit& unit, int64_t index, Moments* moments, float* scratch) {
    const group_norm::Cut& cut = a.cut;
    group_norm::Piece piece = cut.piece(unit, index);
    const float* x = read_tile(a.x, piece, scratch + 3 * cut.unit_channels);
    const float* pre_shift = a.options.pre_shift;
    if (pre_shift != nullptr) {
        pre_shift += piece.sample * cut.channels + unit.first_channel + piece.first_channel;
    }
    Moments* out = moments + index * cut.unit_groups;
    if (cut.channels_last) {
        pixel_moments(x, piece.pixels, cut.channels, cut.groups, pre_shift, scratch, out);
    } else if (pre_shift == nullptr) {
        *out = row_moments(x, 1, piece.elements, nullptr);
    } else {
        *out = row_moments(x, piece.channels, piece.pixels, pre_shift);
    }
}

// coefficients: centre, gain and offset, each of all channels of the unit.
void group_norm_finish(const Forward& a, const Unit& unit, const Moments* moments, float* coefficients) {
    const group_norm::Cut& cut = a.cut;
    int64_t groups = cut.unit_groups;
    for (int64_t g = 0; g < groups; ++g) {
        Moments all = moments[g];
        for (int64_t i = 1; i < cut.pieces; ++i) all.merge(moments[i * groups + g]);
        double variance = all.m2 / all.count;
        if (variance < 0) variance = 0;  // -0 and below by rounding; NaN stays
        double rstd = 1.0 / __builtin_sqrt(variance + a.options.eps);
        int64_t at = unit.sample * cut.groups + unit.first_group + g;
        if (a.mean != nullptr) {
            a.mean[at] = static_cast<float>(all.mean);
            a.rstd[at] = static_cast<float>(rstd);
        }
        auto line = [&](const ChannelOptions<double>& o, auto& values, int64_t i) {
            set_line(affine(all.mean, rstd, o), values, i);
        };
        set_coefficients<3>(a.options, cut, unit, g, coefficients, line);
    }
}

// Rows of a few vectors, so many of them at a time that there are four vectors; returns how many rows it did.
template <bool silu, int vectors>
DD_INLINE int64_t map_short_rows(const float* x, float* y, int64_t rows, const float* coefficients, int64_t stride) {
    constexpr int64_t some = 4 / vectors;
    int64_t row = 0;
    for (; row + some <= rows; row += some, x += 4 * kLanes, y += 4 * kLanes) {
        Vec z[4];
        for (int j = 0; j < 4; ++j) {
            z[j] = normalised(x + j * kLanes, kLanes, row_line(coefficients + row + j / vectors, stride));
        }
        activate<silu>(z);
        for (int j = 0; j < 4; ++j) store(y + j * kLanes, z[j]);
    }
    return row;
}

template <bool silu>
DD_INLINE void map_rows(const float* x, float* y, int64_t rows, int64_t length, const float* coefficients,
                        int64_t stride) {
    int64_t row = 0;
    if (length == kLanes) row = map_short_rows<silu, 1>(x, y, rows, coefficients, stride);
    if (length == 2 * kLanes) row = map_short_rows<silu, 2>(x, y, rows, coefficients, stride);
    for (x += row * length, y += row * length; row < rows; ++row, x += length, y += length) {
        const Line line = row_line(coefficients + row, stride);
        for_blocks(length, [&](auto block, int64_t i, int64_t lanes) DD_INLINE_LAMBDA {
            Vec z[block.count];
            for (int j = 0; j < block.count; ++j) z[j] = normalised(x + i + j * kLanes, lanes, line);
            activate<silu>(z);
            for (int j = 0; j < block.count; ++j) store(y + i + j * kLanes, lanes, z[j]);
        });
    }
}

// In the cache, a few pixels of some channels at a time, which share what is per channel.
template <bool silu>
DD_INLINE void map_pixels(const float* x, float* y, int64_t pixels, int64_t channels, const float* coefficients) {
    for_pixels<4>(pixels, false, [&](auto rows, int64_t pixel) DD_INLINE_LAMBDA {
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            Line line = line_of(coefficients + c, channels, left);
            int64_t at = pixel * channels + c;
            Vec z[rows.count];
            for (int r = 0; r < rows.count; ++r) z[r] = normalised(x + at + r * channels, left, line);
            activate<silu>(z);
            for (int r = 0; r < rows.count; ++r) store(y + at + r * channels, left, z[r]);
        });
    });
}

// From beyond it, in the order of memory.
template <bool silu>
DD_INLINE void map_pixels_in_order(const float* x, float* y, int64_t pixels, int64_t channels,
                                   const float* coefficients) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, y += channels) {
        for_blocks(channels, [&](auto block, int64_t c, int64_t lanes) DD_INLINE_LAMBDA {
            Vec z[block.count];
            for (int j = 0; j < block.count; ++j) {
                int64_t at = c + j * kLanes;
                z[j] = normalised(x + at, lanes, line_of(coefficients + at, channels, lanes));
            }
            activate<silu>(z);
            for (int j = 0; j < block.count; ++j) store(y + c + j * kLanes, lanes, z[j]);
        });
    }
}

template <bool silu>
void map_piece(const Forward& a, const Unit& unit, int64_t index, const float* coefficients, float* scratch) {
    const group_norm::Cut& cut = a.cut;
    group_norm::Piece piece = cut.piece(unit, index);
    const float* x = read_tile(a.x, piece, scratch);
    float* y = output_tile(a.y, piece, scratch);  // x is read before y is written, block by block
    if (cut.channels_last) {
        auto map = cut.streams() ? map_pixels_in_order<silu> : map_pixels<silu>;
        map(x, y, piece.pixels, cut.channels, coefficients);
    } else {
        map_rows<silu>(x, y, piece.channels, piece.pixels, coefficients + piece.first_channel, cut.unit_channels);
    }
    write_tile(a.y, piece, y);
}

void group_norm_map(const Forward& a, const Unit& unit, int64_t index, const float* coefficients, float* scratch) {
    (a.options.silu ? map_piece<true> : map_piece<false>)(a, unit, index, coefficients, scratch);
}

}  // namespace dd::DD_ISA
