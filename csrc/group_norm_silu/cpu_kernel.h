#include "group_norm_silu/cpu_blocks.h"

namespace dd::DD_ISA {

using group_norm::Forward;
using group_norm::Moments;

// Centred on a first estimate of the mean and then corrected for it, so that neither sum cancels.
DD_INLINE Moments centred_moments(double count, double centre, double sum, double sum_of_squares) {
    return {count, centre + sum / count, sum_of_squares - sum * sum / count};
}

// Where centre - pre_shift[c] of each channel, as rounded, really centres x + pre_shift, on average.
DD_INLINE double rounded_centre(float centre, const float* pre_shift, int64_t channels) {
    if (pre_shift == nullptr) return centre;
    double total = 0;
    for (int64_t c = 0; c < channels; ++c) total += static_cast<double>(centre - pre_shift[c]) + pre_shift[c];
    return total / static_cast<double>(channels);
}

// Of x + pre_shift over rows of one group; pre_shift is null or has one value per row.
DD_INLINE Moments row_moments(const float* x, int64_t rows, int64_t length, const float* pre_shift) {
    Vec totals[4] = {};
    for (int64_t row = 0; row < rows; ++row) {
        Vec shift = splat(pre_shift == nullptr ? 0.0f : pre_shift[row]);
        for_blocks(length, [&](auto block, int64_t i, int64_t lanes) {
            for (int j = 0; j < block.count; ++j) {
                totals[j] += keep_first(load_some(x + row * length + i + j * kLanes, lanes) + shift, lanes);
            }
        });
    }
    double count = static_cast<double>(rows * length);
    float centre = static_cast<float>(sum((totals[0] + totals[1]) + (totals[2] + totals[3])) / count);
    Vec sums[4] = {}, squares[4] = {};
    for (int64_t row = 0; row < rows; ++row) {
        Vec from = splat(pre_shift == nullptr ? centre : centre - pre_shift[row]);
        for_blocks(length, [&](auto block, int64_t i, int64_t lanes) {
            for (int j = 0; j < block.count; ++j) {
                Vec d = keep_first(load_some(x + row * length + i + j * kLanes, lanes) - from, lanes);
                sums[j] += d;
                squares[j] = fma(d, d, squares[j]);
            }
        });
    }
    return centred_moments(count, rounded_centre(centre, pre_shift, rows),
                           sum((sums[0] + sums[1]) + (sums[2] + sums[3])),
                           sum((squares[0] + squares[1]) + (squares[2] + squares[3])));
}

DD_INLINE double sum_of(const float* values, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[i];
    return total;
}

// sums[c] of x[pixel][c] over the pixels.
DD_INLINE void sum_pixels(const float* x, int64_t pixels, int64_t channels, float* sums) {
    fill(sums, channels, 0.0f);
    for_pixels(pixels, [&](auto rows, int64_t pixel) {
        for_blocks<1>(channels, [&](auto, int64_t c, int64_t lanes) {
            Vec total{};
            for (int r = 0; r < rows.count; ++r) total += load_some(x + (pixel + r) * channels + c, lanes);
            store_some(sums + c, lanes, load_some(sums + c, lanes) + total);
        });
    });
}

// The same of d = x[pixel][c] - centres[c], and of its square.
DD_INLINE void sum_deviations(const float* x, int64_t pixels, int64_t channels, const float* centres, float* sums,
                              float* squares) {
    fill(sums, channels, 0.0f);
    fill(squares, channels, 0.0f);
    for_pixels(pixels, [&](auto rows, int64_t pixel) {
        for_blocks<1>(channels, [&](auto, int64_t c, int64_t lanes) {
            Vec total{}, square{}, centre = load_some(centres + c, lanes);
            for (int r = 0; r < rows.count; ++r) {
                Vec d = load_some(x + (pixel + r) * channels + c, lanes) - centre;
                total += d;
                square = fma(d, d, square);
            }
            store_some(sums + c, lanes, load_some(sums + c, lanes) + total);
            store_some(squares + c, lanes, load_some(squares + c, lanes) + square);
        });
    });
}

// Of x + pre_shift over pixels [pixels][channels], for every group; scratch holds 3 floats per channel.
DD_INLINE void pixel_moments(const float* x, int64_t pixels, int64_t channels, int64_t groups, const float* pre_shift,
                             float* scratch, Moments* out) {
    float *sums = scratch, *squares = sums + channels, *centres = squares + channels;
    int64_t width = channels / groups;
    double count = static_cast<double>(pixels * width);
    sum_pixels(x, pixels, channels, sums);
    for (int64_t g = 0; g < groups; ++g) {
        double total = sum_of(sums + g * width, width);
        if (pre_shift != nullptr) total += static_cast<double>(pixels) * sum_of(pre_shift + g * width, width);
        float centre = static_cast<float>(total / count);
        const float* shifts = pre_shift == nullptr ? nullptr : pre_shift + g * width;
        out[g].mean = rounded_centre(centre, shifts, width);
        for (int64_t c = 0; c < width; ++c) centres[g * width + c] = shifts == nullptr ? centre : centre - shifts[c];
    }
    sum_deviations(x, pixels, channels, centres, sums, squares);
    for (int64_t g = 0; g < groups; ++g) {
        out[g] =
            centred_moments(count, out[g].mean, sum_of(sums + g * width, width), sum_of(squares + g * width, width));
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
        set_lines(a.options, cut, unit, g, all.mean, rstd, coefficients);
    }
}

template <bool silu>
DD_INLINE Vec map_vector(const float* x, int64_t lanes, const Line& line) {
    return activation<silu>(fma(load_some(x, lanes) - line.centre, line.gain, line.offset));
}

// The line of one row, in every lane; `stride` parts centre, gain and offset.
DD_INLINE Line row_line(const float* coefficients, int64_t stride) {
    return {splat(coefficients[0]), splat(coefficients[stride]), splat(coefficients[2 * stride])};
}

// Rows of a few vectors, so many of them at a time that there are four vectors; returns how many rows it did.
template <bool silu, int vectors>
DD_INLINE int64_t map_short_rows(const float* x, float* y, int64_t rows, const float* coefficients, int64_t stride) {
    constexpr int64_t some = 4 / vectors;
    int64_t row = 0;
    for (; row + some <= rows; row += some, x += 4 * kLanes, y += 4 * kLanes) {
        Vec out[4];
        for (int j = 0; j < 4; ++j) {
            out[j] = map_vector<silu>(x + j * kLanes, kLanes, row_line(coefficients + row + j / vectors, stride));
        }
        for (int j = 0; j < 4; ++j) store(y + j * kLanes, out[j]);
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
        for_blocks(length, [&](auto block, int64_t i, int64_t lanes) {
            Vec out[block.count];
            for (int j = 0; j < block.count; ++j) out[j] = map_vector<silu>(x + i + j * kLanes, lanes, line);
            for (int j = 0; j < block.count; ++j) store_some(y + i + j * kLanes, lanes, out[j]);
        });
    }
}

template <bool silu>
DD_INLINE void map_pixels(const float* x, float* y, int64_t pixels, int64_t channels, const float* coefficients) {
    for_pixels(pixels, [&](auto rows, int64_t pixel) {
        for_blocks<1>(channels, [&](auto, int64_t c, int64_t lanes) {
            Line line = line_of(coefficients + c, channels, lanes);
            Vec out[rows.count];
            for (int r = 0; r < rows.count; ++r) {
                out[r] = map_vector<silu>(x + (pixel + r) * channels + c, lanes, line);
            }
            for (int r = 0; r < rows.count; ++r) store_some(y + (pixel + r) * channels + c, lanes, out[r]);
        });
    });
}

template <bool silu>
void map_piece(const Forward& a, const Unit& unit, int64_t index, const float* coefficients, float* scratch) {
    const group_norm::Cut& cut = a.cut;
    group_norm::Piece piece = cut.piece(unit, index);
    const float* x = read_tile(a.x, piece, scratch);
    float* y = output_tile(a.y, piece, scratch);  // x is read before y is written, block by block
    if (cut.channels_last) {
        map_pixels<silu>(x, y, piece.pixels, cut.channels, coefficients);
    } else {
        map_rows<silu>(x, y, piece.channels, piece.pixels, coefficients + piece.first_channel, cut.unit_channels);
    }
    write_tile(a.y, piece, y);
}

void group_norm_map(const Forward& a, const Unit& unit, int64_t index, const float* coefficients, float* scratch) {
    (a.options.silu ? map_piece<true> : map_piece<false>)(a, unit, index, coefficients, scratch);
}

}  // namespace dd::DD_ISA
