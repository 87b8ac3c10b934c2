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
            float centre = set_line(affine(mean, rstd, o), values, i);
            values[3][i] = static_cast<float>(o.weight * (1 + o.scale));
            values[4][i] = static_cast<float>(centre_remainder(centre, mean, rstd, o));
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

// A vector at a time: the processor's own reordering overlaps more of them than there are registers for. Lanes
// beyond the row have dy = 0, and so dz.
template <bool silu>
DD_INLINE VecSums reduce_row(const float* x, const float* dy, float* dz_out, int64_t pixels, const Line& line) {
    auto visit = [&](int64_t i, int64_t left, VecSums& sums) {
        Vec d = load(x + i, left) - line.centre;
        Vec dz = activation_gradient<silu>(load(dy + i, left), fma(d, line.gain, line.offset));
        if (dz_out != nullptr) store(dz_out + i, left, dz);
        sums.add(dz, d);
    };
    constexpr int64_t some = 128;
    VecSums all;
    int64_t i = 0, whole = pixels / kLanes * kLanes;
    while (i < whole) {
        VecSums sums;
        for (int64_t end = i + some < whole ? i + some : whole; i < end; i += kLanes) visit(i, kLanes, sums);
        all.add(sums);
    }
    if (whole < pixels) visit(whole, pixels - whole, all);
    return all;
}

template <bool silu>
DD_INLINE void reduce_rows(const float* x, const float* dy, float* dz_out, const group_norm::Piece& piece,
                           const float* coefficients, int64_t stride, const ChannelSums& out) {
    for (int64_t row = 0; row < piece.channels; ++row) {
        int64_t at = row * piece.pixels;
        Line line{splat(coefficients[row]), splat(coefficients[stride + row]), splat(coefficients[2 * stride + row])};
        float* dz = dz_out == nullptr ? nullptr : dz_out + at;
        VecSums sums = reduce_row<silu>(x + at, dy + at, dz, piece.pixels, line);
        out.dz[row] = sum(sums.dz);
        out.dz_d[row] = sum(sums.dz_d);
    }
}

// scratch holds 2 floats per channel.
template <bool silu>
DD_INLINE void reduce_pixels(const float* x, const float* dy, float* dz_out, const group_norm::Piece& piece,
                             bool streams, const float* coefficients, float* scratch, const ChannelSums& out) {
    int64_t channels = piece.channels;
    float *sums_dz = scratch, *sums_dz_d = sums_dz + channels;
    fill(scratch, 2 * channels, 0.0f);
    for_pixels<4>(piece.pixels, streams, [&](auto pixels, int64_t pixel) DD_INLINE_LAMBDA {
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            Line line = line_of(coefficients + c, channels, left);
            VecSums sums;
            for (int p = 0; p < pixels.count; ++p) {
                int64_t at = (pixel + p) * channels + c;
                Vec d = load(x + at, left) - line.centre;
                Vec dz = activation_gradient<silu>(load(dy + at, left), fma(d, line.gain, line.offset));
                if (dz_out != nullptr) store(dz_out + at, left, dz);
                sums.add(dz, d);
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
        Line line{splat(c[0]), splat(c[stride]), splat(c[2 * stride])};
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
