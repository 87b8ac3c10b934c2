#include "group_norm_silu/cpu_blocks.h"

namespace dd::DD_ISA {

using group_norm::Backward;
using group_norm::ChannelSums;

// coefficients: centre, gain, offset, slope and level, each of all channels of the unit.
void group_norm_backward_prepare(const Backward& a, const Unit& unit, float* coefficients) {
    const group_norm::Cut& cut = a.cut;
    int64_t first = unit.sample * cut.groups + unit.first_group;
    for (int64_t g = 0; g < cut.unit_groups; ++g) {
        set_lines(a.options, cut, unit, g, a.mean[first + g], a.rstd[first + g], coefficients);
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
    Vec dz{}, dz_d{}, d{};

    DD_INLINE void add(Vec new_dz, Vec new_d) {
        dz += new_dz;
        dz_d = fma(new_dz, new_d, dz_d);
        d += new_d;
    }
    DD_INLINE void add(const VecSums& other) {
        dz += other.dz;
        dz_d += other.dz_d;
        d += other.d;
    }
};

template <bool silu>
DD_INLINE VecSums reduce_run(const float* x, const float* dy, float* dz_out, int64_t pixels, const Line& line) {
    VecSums sums[2];
    for_blocks<2>(pixels, [&](auto block, int64_t i, int64_t lanes) {
        Vec d[block.count], dz[block.count];
        for (int j = 0; j < block.count; ++j) {
            int64_t at = i + j * kLanes;
            d[j] = keep_first(load_some(x + at, lanes) - line.centre, lanes);
            dz[j] = activation_gradient<silu>(load_some(dy + at, lanes), fma(d[j], line.gain, line.offset));
            dz[j] = keep_first(dz[j], lanes);
        }
        for (int j = 0; j < block.count; ++j) {
            if (dz_out != nullptr) store_some(dz_out + i + j * kLanes, lanes, dz[j]);
            sums[j].add(dz[j], d[j]);
        }
    });
    sums[0].add(sums[1]);
    return sums[0];
}

template <bool silu>
DD_INLINE void reduce_rows(const float* x, const float* dy, float* dz_out, const group_norm::Piece& piece,
                           const float* coefficients, int64_t stride, ChannelSums* out) {
    constexpr int64_t run = 128;
    for (int64_t row = 0; row < piece.channels; ++row) {
        Line line{splat(coefficients[row]), splat(coefficients[stride + row]), splat(coefficients[2 * stride + row])};
        VecSums sums;
        for (int64_t i = 0; i < piece.pixels; i += run) {
            int64_t left = piece.pixels - i, at = row * piece.pixels + i;
            float* dz = dz_out == nullptr ? nullptr : dz_out + at;
            sums.add(reduce_run<silu>(x + at, dy + at, dz, left < run ? left : run, line));
        }
        out[row] = {sum(sums.dz), sum(sums.dz_d), sum(sums.d)};
    }
}

// scratch holds 3 floats per channel.
template <bool silu>
DD_INLINE void reduce_pixels(const float* x, const float* dy, float* dz_out, const group_norm::Piece& piece,
                             const float* coefficients, float* scratch, ChannelSums* out) {
    int64_t channels = piece.channels;
    float *sums_dz = scratch, *sums_dz_d = sums_dz + channels, *sums_d = sums_dz_d + channels;
    fill(scratch, 3 * channels, 0.0f);
    for_pixels(piece.pixels, [&](auto pixels, int64_t pixel) {
        for_blocks<1>(channels, [&](auto, int64_t c, int64_t lanes) {
            Line line = line_of(coefficients + c, channels, lanes);
            Vec d[pixels.count], dz[pixels.count];
            for (int p = 0; p < pixels.count; ++p) {
                int64_t at = (pixel + p) * channels + c;
                d[p] = load_some(x + at, lanes) - line.centre;
                dz[p] = activation_gradient<silu>(load_some(dy + at, lanes), fma(d[p], line.gain, line.offset));
            }
            VecSums sums;
            for (int p = 0; p < pixels.count; ++p) {
                if (dz_out != nullptr) store_some(dz_out + (pixel + p) * channels + c, lanes, dz[p]);
                sums.add(dz[p], d[p]);
            }
            store_some(sums_dz + c, lanes, load_some(sums_dz + c, lanes) + sums.dz);
            store_some(sums_dz_d + c, lanes, load_some(sums_dz_d + c, lanes) + sums.dz_d);
            store_some(sums_d + c, lanes, load_some(sums_d + c, lanes) + sums.d);
        });
    });
    for (int64_t c = 0; c < channels; ++c) out[c] = {sums_dz[c], sums_dz_d[c], sums_d[c]};
}

template <bool silu>
void reduce_piece(const Backward& a, const Unit& unit, int64_t index, const float* coefficients, ChannelSums* sums,
                  float* scratch, float* kept) {
    int64_t channels = a.cut.unit_channels;
    group_norm::Piece piece = a.cut.piece(unit, index);
    float *x_buffer = scratch + 3 * channels, *dy_buffer = x_buffer + a.cut.piece_elements();
    const float *x = read_tile(a.x, piece, x_buffer), *dy = read_tile(a.dy, piece, dy_buffer);
    float* dz = kept_dz(a, unit, piece, kept);
    ChannelSums* out = sums + piece.part * channels + piece.first_channel;
    if (a.cut.channels_last) {
        reduce_pixels<silu>(x, dy, dz, piece, coefficients, scratch, out);
    } else {
        reduce_rows<silu>(x, dy, dz, piece, coefficients + piece.first_channel, channels, out);
    }
}

void group_norm_backward_reduce(const Backward& a, const Unit& unit, int64_t index, const float* coefficients,
                                ChannelSums* sums, float* scratch, float* kept) {
    (a.options.silu ? reduce_piece<true> : reduce_piece<false>)(a, unit, index, coefficients, sums, scratch, kept);
}

// The gradients of what a channel is given; sums are over all its pixels, sum_n being of dz n.
DD_INLINE void write_gradients(const Backward& a, int64_t at, const ChannelOptions<double>& o, const ChannelSums& sums,
                               double sum_n, float gain, const GroupLine& group) {
    double pixels = static_cast<double>(a.cut.pixels);
    auto write = [at](float* to, double value) {
        if (to != nullptr) to[at] = static_cast<float>(value);
    };
    a.dweight_parts[at] = (1 + o.scale) * sum_n;
    a.dbias_parts[at] = (1 + o.scale) * sums.dz;
    write(a.dshift, sums.dz);
    write(a.dscale, o.weight * sum_n + o.bias * sums.dz);
    write(a.dpre_shift, sums.dz * gain + sums.d * group.slope + pixels * group.level);
}

void group_norm_backward_finish(const Backward& a, const Unit& unit, ChannelSums* sums, float* coefficients) {
    const group_norm::Cut& cut = a.cut;
    int64_t channels = cut.unit_channels, row = unit.sample * cut.channels + unit.first_channel;
    for (int64_t part = 1; part < cut.parts; ++part) {
        for (int64_t c = 0; c < channels; ++c) sums[c].add(sums[part * channels + c]);
    }
    for (int64_t g = 0; g < cut.unit_groups; ++g) {
        int64_t group = unit.sample * cut.groups + unit.first_group + g;
        double mean = a.mean[group], rstd = a.rstd[group], total_dn = 0, total_dn_n = 0;
        auto sum_n = [&](const ChannelOptions<double>& o, int64_t c) {
            return sums[c].dz_d * rstd + sums[c].dz * centre_remainder(coefficients[c], mean, rstd, o);
        };
        for_options(a.options, cut, unit, g, [&](const OptionBlock& block, int64_t first, int64_t n) {
            for (int64_t i = 0; i < n; ++i) {
                ChannelOptions<double> o = block[i];
                double gain = o.weight * (1 + o.scale);
                total_dn += sums[first + i].dz * gain;
                total_dn_n += sum_n(o, first + i) * gain;
            }
        });
        double each = 1.0 / static_cast<double>(cut.group_channels * cut.pixels);
        for_options(a.options, cut, unit, g, [&](const OptionBlock& block, int64_t first, int64_t n) {
            for (int64_t i = 0; i < n; ++i) {
                int64_t c = first + i;
                ChannelOptions<double> o = block[i];
                double remainder = centre_remainder(coefficients[c], mean, rstd, o);
                GroupLine line = group_line(total_dn * each, total_dn_n * each, rstd, remainder);
                coefficients[3 * channels + c] = line.slope;
                coefficients[4 * channels + c] = line.level;
                write_gradients(a, row + c, o, sums[c], sum_n(o, c), coefficients[channels + c], line);
            }
        });
    }
}

template <bool silu>
DD_INLINE void backward_rows(const float* x, const float* dy, float* dx, const group_norm::Piece& piece,
                             const float* coefficients, int64_t stride) {
    for (int64_t row = 0; row < piece.channels; ++row) {
        const float* c = coefficients + row;
        Line line{splat(c[0]), splat(c[stride]), splat(c[2 * stride])};
        Vec slope = splat(c[3 * stride]), level = splat(c[4 * stride]);
        int64_t start = row * piece.pixels;
        for_blocks(piece.pixels, [&](auto block, int64_t i, int64_t lanes) {
            Vec out[block.count];
            for (int j = 0; j < block.count; ++j) {
                int64_t at = start + i + j * kLanes;
                Vec d = load_some(x + at, lanes) - line.centre;
                Vec dz = activation_gradient<silu>(load_some(dy + at, lanes), fma(d, line.gain, line.offset));
                out[j] = fma(dz, line.gain, fma(d, slope, level));
            }
            for (int j = 0; j < block.count; ++j) store_some(dx + start + i + j * kLanes, lanes, out[j]);
        });
    }
}

template <bool silu>
DD_INLINE void backward_pixels(const float* x, const float* dy, float* dx, const group_norm::Piece& piece,
                               const float* coefficients) {
    int64_t channels = piece.channels;
    for_pixels(piece.pixels, [&](auto pixels, int64_t pixel) {
        for_blocks<1>(channels, [&](auto, int64_t c, int64_t lanes) {
            Line line = line_of(coefficients + c, channels, lanes);
            Vec slope = load_some(coefficients + 3 * channels + c, lanes);
            Vec level = load_some(coefficients + 4 * channels + c, lanes);
            Vec out[pixels.count];
            for (int p = 0; p < pixels.count; ++p) {
                int64_t at = (pixel + p) * channels + c;
                Vec d = load_some(x + at, lanes) - line.centre;
                Vec dz = activation_gradient<silu>(load_some(dy + at, lanes), fma(d, line.gain, line.offset));
                out[p] = fma(dz, line.gain, fma(d, slope, level));
            }
            for (int p = 0; p < pixels.count; ++p) store_some(dx + (pixel + p) * channels + c, lanes, out[p]);
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
        backward_pixels<silu>(x, dy, dx, piece, coefficients);
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
