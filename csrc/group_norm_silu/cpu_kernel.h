#include "group_norm_silu/cpu_blocks.h"

namespace dd::DD_ISA {

using group_norm::Forward;
using group_norm::Moments;

// Centred on a first estimate of the mean and then corrected for it, so that neither sum cancels.
DD_INLINE Moments centred_moments(double count, float centre, double sum, double sum_of_squares) {
    return {count, centre + sum / count, sum_of_squares - sum * sum / count};
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
    return centred_moments(count, centre, sum((sums[0] + sums[1]) + (sums[2] + sums[3])),
                           sum((squares[0] + squares[1]) + (squares[2] + squares[3])));
}

DD_INLINE double sum_of(const float* values, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[i];
    return total;
}

// Of x + pre_shift over pixels [pixels][channels], for every group; scratch holds 3 floats per channel.
DD_INLINE void pixel_moments(const float* x, int64_t pixels, int64_t channels, int64_t groups, const float* pre_shift,
                             float* scratch, Moments* out) {
    float *sums = scratch, *squares = sums + channels, *centres = squares + channels;
    int64_t width = channels / groups;
    double count = static_cast<double>(pixels * width);
    fill(sums, channels, 0.0f);
    for_pixels(x, pixels, channels, [&](auto rows, const float* from) {
        for_blocks(channels, [&](auto block, int64_t i, int64_t lanes) {
            for (int j = 0; j < block.count; ++j, i += kLanes) {
                Vec total = load_some(sums + i, lanes);
                for (int r = 0; r < rows.count; ++r) total += load_some(from + r * channels + i, lanes);
                store_some(sums + i, lanes, total);
            }
        });
    });
    for (int64_t g = 0; g < groups; ++g) {
        double total = sum_of(sums + g * width, width);
        if (pre_shift != nullptr) total += static_cast<double>(pixels) * sum_of(pre_shift + g * width, width);
        float centre = static_cast<float>(total / count);
        out[g].mean = centre;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
            centres[c] = pre_shift == nullptr ? centre : centre - pre_shift[c];
        }
    }
    fill(sums, 2 * channels, 0.0f);
    for_pixels(x, pixels, channels, [&](auto rows, const float* from) {
        for_blocks(channels, [&](auto block, int64_t i, int64_t lanes) {
            for (int j = 0; j < block.count; ++j, i += kLanes) {
                Vec total = load_some(sums + i, lanes), square = load_some(squares + i, lanes);
                Vec centre = load_some(centres + i, lanes);
                for (int r = 0; r < rows.count; ++r) {
                    Vec d = load_some(from + r * channels + i, lanes) - centre;
                    total += d;
                    square = fma(d, d, square);
                }
                store_some(sums + i, lanes, total);
                store_some(squares + i, lanes, square);
            }
        });
    });
    for (int64_t g = 0; g < groups; ++g) {
        out[g] = centred_moments(count, static_cast<float>(out[g].mean), sum_of(sums + g * width, width),
                                 sum_of(squares + g * width, width));
    }
}

void group_norm_reduce(const Forward& a, int64_t unit, int64_t index, Moments* moments, float* scratch) {
    const group_norm::Cut& cut = a.cut;
    group_norm::Piece piece = cut.piece(unit, index);
    const float* x = read_tile(a.x, piece, scratch + 3 * cut.unit_channels());
    const float* pre_shift = a.options.pre_shift;
    if (pre_shift != nullptr) {
        pre_shift += piece.sample * cut.channels + cut.first_channel(unit) + piece.first_channel;
    }
    Moments* out = moments + index * cut.unit_groups();
    if (cut.channels_last) {
        pixel_moments(x, piece.pixels, cut.channels, cut.groups, pre_shift, scratch, out);
    } else if (pre_shift == nullptr) {
        *out = row_moments(x, 1, piece.elements, nullptr);
    } else {
        *out = row_moments(x, piece.channels, piece.pixels, pre_shift);
    }
}

// coefficients: centre, gain and offset, each of all channels of the unit.
void group_norm_finish(const Forward& a, int64_t unit, const Moments* moments, float* coefficients) {
    const group_norm::Cut& cut = a.cut;
    int64_t channels = cut.unit_channels(), groups = cut.unit_groups(), width = cut.group_channels();
    for (int64_t g = 0; g < groups; ++g) {
        Moments all = moments[g];
        for (int64_t i = 1; i < cut.pieces(); ++i) all.merge(moments[i * groups + g]);
        double variance = all.m2 / all.count;
        if (variance < 0) variance = 0;  // -0 and below by rounding; NaN stays
        double rstd = 1.0 / __builtin_sqrt(variance + a.options.eps);
        int64_t at = cut.sample(unit) * cut.groups + cut.first_group(unit) + g;
        a.mean[at] = static_cast<float>(all.mean);
        a.rstd[at] = static_cast<float>(rstd);
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
            Affine line = affine(all.mean, rstd, channel_options(a.options, cut, unit, c));
            coefficients[c] = line.centre;
            coefficients[channels + c] = line.gain;
            coefficients[2 * channels + c] = line.offset;
        }
    }
}

template <bool silu>
DD_INLINE void map_rows(const float* x, float* y, int64_t rows, int64_t length, const float* coefficients,
                        int64_t stride) {
    for (int64_t row = 0; row < rows; ++row, x += length, y += length) {
        Vec centre = splat(coefficients[row]), gain = splat(coefficients[stride + row]);
        Vec offset = splat(coefficients[2 * stride + row]);
        for_blocks(length, [&](auto block, int64_t i, int64_t lanes) {
            Vec z[block.count];
            for (int j = 0; j < block.count; ++j) {
                z[j] = fma(load_some(x + i + j * kLanes, lanes) - centre, gain, offset);
            }
            for (int j = 0; j < block.count; ++j) z[j] = activation<silu>(z[j]);
            for (int j = 0; j < block.count; ++j) store_some(y + i + j * kLanes, lanes, z[j]);
        });
    }
}

template <bool silu>
DD_INLINE void map_pixels(const float* x, float* y, int64_t pixels, int64_t channels, const float* coefficients) {
    const float *centre = coefficients, *gain = centre + channels, *offset = gain + channels;
    for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, y += channels) {
        for_blocks(channels, [&](auto block, int64_t i, int64_t lanes) {
            Vec z[block.count];
            for (int j = 0; j < block.count; ++j) {
                int64_t c = i + j * kLanes;
                z[j] = fma(load_some(x + c, lanes) - load_some(centre + c, lanes), load_some(gain + c, lanes),
                           load_some(offset + c, lanes));
            }
            for (int j = 0; j < block.count; ++j) z[j] = activation<silu>(z[j]);
            for (int j = 0; j < block.count; ++j) store_some(y + i + j * kLanes, lanes, z[j]);
        });
    }
}

template <bool silu>
void map_piece(const Forward& a, int64_t unit, int64_t index, const float* coefficients, float* scratch) {
    const group_norm::Cut& cut = a.cut;
    group_norm::Piece piece = cut.piece(unit, index);
    const float* x = read_tile(a.x, piece, scratch);
    float* y = output_tile(a.y, piece, scratch);  // x is read before y is written, block by block
    if (cut.channels_last) {
        map_pixels<silu>(x, y, piece.pixels, cut.channels, coefficients);
    } else {
        map_rows<silu>(x, y, piece.channels, piece.pixels, coefficients + piece.first_channel, cut.unit_channels());
    }
    write_tile(a.y, piece, y);
}

void group_norm_map(const Forward& a, int64_t unit, int64_t index, const float* coefficients, float* scratch) {
    (a.options.silu ? map_piece<true> : map_piece<false>)(a, unit, index, coefficients, scratch);
}

}  // namespace dd::DD_ISA
