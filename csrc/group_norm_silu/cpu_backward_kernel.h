#include "group_norm_silu/cpu_blocks.h"

namespace dd::DD_ISA {

using group_norm::Backward;
using group_norm::ChannelSums;

// coefficients: centre, gain and offset, and until the sums are known what each channel's gradient weighs in its
// group and what rounding took from its centre, each of all channels of the unit.
void group_norm_backward_prepare(const Backward& a, const Unit& unit, float* coefficients) {
    const group_norm::Cut& cut = a.cut;
    int64_t first = unit.sample * cut.groups + unit.first_group;
    for (int64_t g = 0; g < cut.unit_groups; ++g) {
        double mean = a.mean[first + g], rstd = a.rstd[first + g];
        auto set = [&](const ChannelOptions<double>& o, auto& values, int64_t i) {
            Affine line = affine(mean, rstd, o);
            set_line(line, values, i);
            values[3][i] = static_cast<float>(o.weight * (1 + o.scale));
            values[4][i] = static_cast<float>(centre_remainder(line.centre, mean, rstd, o));
        };
        set_coefficients<5>(a.options, cut, unit, g, coefficients, set);
    }
}

// Where dz of a piece is kept for the map, or null: in dx, or where that would round it to 16 bits in `kept`,
// which has room for the whole unit or is null.
DD_INLINE float* kept_dz(const Backward& a, const Unit& unit, const group_norm::Piece& piece, float* kept) {
    if (!a.options.silu) return nullptr;
    if (a.dx.dtype == DType::float32) return static_cast<float*>(address(a.dx, piece));
    int64_t unit_offset = a.cut.channels_last ? 0 : unit.first_channel * a.cut.pixels;
    return kept == nullptr ? nullptr : kept + (piece.offset - unit_offset);
}

// Float sums of a few pixels are added to others of their own size, then these to one another, and last
// in double: a long sum would lose more than all the rest of the arithmetic.
struct VecSums {
    Vec dz{}, dz_d{};

    DD_INLINE void add(Vec new_dz, Vec d) {
        dz += new_dz;
        dz_d = fma(new_dz, d, dz_d);
    }
    DD_INLINE void add(const VecSums& other) {
        dz += other.dz;
        dz_d += other.dz_d;
    }
};

// The denominators of the sigmoids, before they are used: of the operations that a processor can have in flight, two
// loops of short chains overlap more than one loop of long ones.
DD_INLINE void set_denominators(const float* x, int64_t n, const Line& line, float* denominators) {
    for_blocks<2>(n, [&](auto block, int64_t i, int64_t left) DD_INLINE_LAMBDA {
        Vec z[block.count], denominator[block.count];
        for (int j = 0; j < block.count; ++j) z[j] = normalised(x + i + j * kLanes, left, line);
        one_plus_exp_minus(z, denominator);
        for (int j = 0; j < block.count; ++j) store(denominators + i + j * kLanes, left, denominator[j]);
    });
}

// The same of some pixels of all channels.
template <int pixels>
DD_INLINE void set_denominators(const float* x, int64_t channels, const float* coefficients, float* denominators) {
    for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
        Line line = line_of(coefficients + c, channels, left);
        Vec z[pixels], denominator[pixels];
        for (int p = 0; p < pixels; ++p) z[p] = normalised(x + p * channels + c, left, line);
        one_plus_exp_minus(z, denominator);
        for (int p = 0; p < pixels; ++p) store(denominators + p * channels + c, left, denominator[p]);
    });
}

// Adds a vector of elements to the sums. With SiLU, dz holds the denominators and gets what its name says.
template <bool silu>
DD_INLINE void reduce_vector(const float* x, const float* dy, float* dz, int64_t left, const Line& line,
                             VecSums& sums) {
    Vec d = load(x, left) - line.centre;
    Vec gradient = load(dy, left);
    if (silu) {
        gradient = silu_gradient(gradient, fma(d, line.gain, line.offset), load(dz, left));
        gradient = keep_some(gradient, left);  // the lanes beyond the row were divided by 0
        store(dz, left, gradient);
    }
    sums.add(gradient, d);
}

template <bool silu>
DD_INLINE VecSums reduce_row(const float* x, const float* dy, float* dz, int64_t pixels, const Line& line) {
    constexpr int64_t some = 128;
    VecSums all;
    int64_t i = 0, whole = pixels / kLanes * kLanes;
    while (i < whole) {
        VecSums sums;
        for (int64_t end = i + some < whole ? i + some : whole; i < end; i += kLanes) {
            reduce_vector<silu>(x + i, dy + i, dz + i, kLanes, line, sums);
        }
        all.add(sums);
    }
    if (whole < pixels) reduce_vector<silu>(x + whole, dy + whole, dz + whole, pixels - whole, line, all);
    return all;
}

template <bool silu>
DD_INLINE void reduce_rows(const float* x, const float* dy, float* dz, const group_norm::Piece& piece,
                           const float* coefficients, int64_t stride, const ChannelSums& out) {
    int64_t pixels = piece.pixels;
    for (int64_t row = 0; silu && row < piece.channels; ++row) {
        set_denominators(x + row * pixels, pixels, row_line(coefficients + row, stride), dz + row * pixels);
    }
    for (int64_t row = 0; row < piece.channels; ++row) {
        int64_t at = row * pixels;
        VecSums sums = reduce_row<silu>(x + at, dy + at, dz + at, pixels, row_line(coefficients + row, stride));
        out.dz[row] = sum(sums.dz);
        out.dz_d[row] = sum(sums.dz_d);
    }
}

// scratch holds 2 floats per channel.
template <bool silu>
DD_INLINE void reduce_pixels(const float* x, const float* dy, float* dz, const group_norm::Piece& piece, bool streams,
                             const float* coefficients, float* scratch, const ChannelSums& out) {
    int64_t channels = piece.channels;
    float *sums_dz = scratch, *sums_dz_d = sums_dz + channels;
    fill(scratch, 2 * channels, 0.0f);
    for_pixels<4>(piece.pixels, streams, [&](auto pixels, int64_t pixel) DD_INLINE_LAMBDA {
        const int64_t first = pixel * channels;
        if (silu) set_denominators<pixels.count>(x + first, channels, coefficients, dz + first);
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            Line line = line_of(coefficients + c, channels, left);
            VecSums sums;
            for (int p = 0; p < pixels.count; ++p) {
                int64_t at = first + p * channels + c;
                reduce_vector<silu>(x + at, dy + at, dz + at, left, line, sums);
            }
            store(sums_dz + c, left, load(sums_dz + c, left) + sums.dz);
            store(sums_dz_d + c, left, load(sums_dz_d + c, left) + sums.dz_d);
        });
    });
    for (int64_t c = 0; c < channels; ++c) out.dz[c] = sums_dz[c];
    for (int64_t c = 0; c < channels; ++c) out.dz_d[c] = sums_dz_d[c];
}

// Sets out.d; scratch holds 2 floats per channel.
DD_INLINE void add_deviations(const Backward& a, const float* x, const group_norm::Piece& piece, const float* centres,
                              float* scratch, const ChannelSums& out) {
    int64_t channels = piece.channels, pixels = piece.pixels;
    if (a.cut.channels_last) {
        sum_deviations(x, pixels, channels, centres, scratch, scratch + channels);
        for (int64_t c = 0; c < channels; ++c) out.d[c] = scratch[c];
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            out.d[c] = row_deviations(x + c * pixels, 1, pixels, nullptr, centres[c]).sum;
        }
    }
}

template <bool silu>
void reduce_piece(const Backward& a, const Unit& unit, int64_t index, const float* coefficients, double* sums,
                  float* scratch, float* kept) {
    int64_t channels = a.cut.unit_channels;
    group_norm::Piece piece = a.cut.piece(unit, index);
    float *x_buffer = scratch + 2 * channels, *dy_buffer = x_buffer + a.cut.piece_elements();
    const float *x = read_tile(a.x, piece, x_buffer), *dy = read_tile(a.dy, piece, dy_buffer);
    float* dz = kept_dz(a, unit, piece, kept);
    if (dz == nullptr) dz = dy_buffer + a.cut.piece_elements();  // where nobody reads it later
    ChannelSums out(sums, channels, piece.part, piece.first_channel);
    coefficients += piece.first_channel;
    if (a.cut.channels_last) {
        reduce_pixels<silu>(x, dy, dz, piece, a.cut.streams(), coefficients, scratch, out);
    } else {
        reduce_rows<silu>(x, dy, dz, piece, coefficients, channels, out);
    }
    if (a.dpre_shift != nullptr) add_deviations(a, x, piece, coefficients, scratch, out);
}

void group_norm_backward_reduce(const Backward& a, const Unit& unit, int64_t index, const float* coefficients,
                                double* sums, float* scratch, float* kept) {
    (a.options.silu ? reduce_piece<true> : reduce_piece<false>)(a, unit, index, coefficients, sums, scratch, kept);
}

// dx's slope and level of a group, in place of the shares and remainders; sums.dz_d become those of dz n.
DD_INLINE void finish_group(const ChannelSums& sums, int64_t first, int64_t last, double count, double rstd,
                            float* share, float* remainder) {
    double dn = 0, dn_n = 0;
    for (int64_t c = first; c < last; ++c) {
        double dz_n = sums.dz_d[c] * rstd + sums.dz[c] * remainder[c];
        dn += sums.dz[c] * share[c];
        dn_n += dz_n * share[c];
        sums.dz_d[c] = dz_n;
    }
    for (int64_t c = first; c < last; ++c) {
        GroupLine line = group_line(dn / count, dn_n / count, rstd, double{remainder[c]});
        share[c] = line.slope;
        remainder[c] = line.level;
    }
}

// The gradients of what the channels of a unit are given; `at` is the first of them among all.
DD_INLINE void write_gradients(const Backward& a, const Unit& unit, int64_t at, const ChannelSums& sums,
                               const float* gain, const float* slope, const float* level) {
    const group_norm::Options& o = a.options;
    int64_t channels = a.cut.unit_channels;
    double pixels = static_cast<double>(a.cut.pixels), *dz_n = sums.dz_d;
    for (int64_t c = 0; c < channels; ++c) {
        double factor = o.scale == nullptr ? 1.0 : 1.0 + o.scale[at + c];
        a.dweight_parts[at + c] = factor * dz_n[c];
        a.dbias_parts[at + c] = factor * sums.dz[c];
    }
    for (int64_t c = 0; c < channels && a.dshift != nullptr; ++c) a.dshift[at + c] = static_cast<float>(sums.dz[c]);
    for (int64_t c = 0; c < channels && a.dscale != nullptr; ++c) {
        double weight = o.weight == nullptr ? 1.0 : o.weight[unit.first_channel + c];
        double bias = o.bias == nullptr ? 0.0 : o.bias[unit.first_channel + c];
        a.dscale[at + c] = static_cast<float>(weight * dz_n[c] + bias * sums.dz[c]);
    }
    for (int64_t c = 0; c < channels && a.dpre_shift != nullptr; ++c) {
        a.dpre_shift[at + c] = static_cast<float>(sums.dz[c] * gain[c] + sums.d[c] * slope[c] + pixels * level[c]);
    }
}

void group_norm_backward_finish(const Backward& a, const Unit& unit, double* sums, float* coefficients) {
    const group_norm::Cut& cut = a.cut;
    int64_t channels = cut.unit_channels, width = cut.group_channels;
    int64_t wanted = (a.dpre_shift == nullptr ? 2 : 3) * channels;
    for (int64_t part = 1; part < cut.parts; ++part) {
        for (int64_t i = 0; i < wanted; ++i) sums[i] += sums[3 * part * channels + i];
    }
    ChannelSums all(sums, channels, 0, 0);
    float *gain = coefficients + channels, *share = gain + 2 * channels, *remainder = share + channels;
    for (int64_t g = 0; g < cut.unit_groups; ++g) {
        double rstd = a.rstd[unit.sample * cut.groups + unit.first_group + g];
        double count = static_cast<double>(width * cut.pixels);
        finish_group(all, g * width, (g + 1) * width, count, rstd, share, remainder);
    }
    write_gradients(a, unit, unit.sample * cut.channels + unit.first_channel, all, gain, share, remainder);
}

template <bool silu>
DD_INLINE void backward_rows(const float* x, const float* dy, float* dx, const group_norm::Piece& piece,
                             const float* coefficients, int64_t stride) {
    for (int64_t row = 0; row < piece.channels; ++row) {
        const float* c = coefficients + row;
        Line line = row_line(c, stride);
        Vec slope = splat(c[3 * stride]), level = splat(c[4 * stride]);
        int64_t start = row * piece.pixels;
        for_blocks(piece.pixels, [&](auto block, int64_t i, int64_t lanes) DD_INLINE_LAMBDA {
            Vec out[block.count];
            for (int j = 0; j < block.count; ++j) {
                int64_t at = start + i + j * kLanes;
                Vec d = load(x + at, lanes) - line.centre;
                Vec dz = activation_gradient<silu>(load(dy + at, lanes), fma(d, line.gain, line.offset));
                out[j] = fma(dz, line.gain, fma(d, slope, level));
            }
            for (int j = 0; j < block.count; ++j) store(dx + start + i + j * kLanes, lanes, out[j]);
        });
    }
}

template <bool silu>
DD_INLINE void backward_pixels(const float* x, const float* dy, float* dx, const group_norm::Piece& piece, bool streams,
                               const float* coefficients) {
    int64_t channels = piece.channels;
    for_pixels<4>(piece.pixels, streams, [&](auto pixels, int64_t pixel) DD_INLINE_LAMBDA {
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            Line line = line_of(coefficients + c, channels, left);
            Vec slope = load(coefficients + 3 * channels + c, left);
            Vec level = load(coefficients + 4 * channels + c, left);
            for (int p = 0; p < pixels.count; ++p) {
                int64_t at = (pixel + p) * channels + c;
                Vec d = load(x + at, left) - line.centre;
                Vec dz = activation_gradient<silu>(load(dy + at, left), fma(d, line.gain, line.offset));
                store(dx + at, left, fma(dz, line.gain, fma(d, slope, level)));
            }
        });
    });
}

// dz is what the sums kept, or null.
template <bool silu>
void backward_piece(const Backward& a, const group_norm::Piece& piece, const float* dz, const float* coefficients,
                    float* scratch) {
    float *x_buffer = scratch, *dy_buffer = scratch + a.cut.piece_elements();
    const float *x = read_tile(a.x, piece, x_buffer), *dy = dz != nullptr ? dz : read_tile(a.dy, piece, dy_buffer);
    float* dx = output_tile(a.dx, piece, dy_buffer);  // dy is read before dx is written, block by block
    if (a.cut.channels_last) {
        backward_pixels<silu>(x, dy, dx, piece, a.cut.streams(), coefficients);
    } else {
        backward_rows<silu>(x, dy, dx, piece, coefficients + piece.first_channel, a.cut.unit_channels);
    }
    write_tile(a.dx, piece, dx);
}

void group_norm_backward_map(const Backward& a, const Unit& unit, int64_t index, const float* coefficients,
                             float* scratch, float* kept) {
    group_norm::Piece piece = a.cut.piece(unit, index);
    const float* dz = kept_dz(a, unit, piece, kept);
    bool from_dy = a.options.silu && dz == nullptr;
    (from_dy ? backward_piece<true> : backward_piece<false>)(a, piece, dz, coefficients, scratch);
}

}  // namespace dd::DD_ISA
