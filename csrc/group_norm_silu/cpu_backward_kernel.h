#include "group_norm_silu/cpu_loops.h"

namespace dd::DD_ISA {

using group_norm::Backward;
using group_norm::ChannelSums;

// Sets coefficients [5][unit_channels]: centre, gain and offset, and, until the sums are known, the factor dn / dz and
// the remainder of the centre.
void group_norm_backward_prepare(const Backward& a, const Unit& unit, float* coefficients) {
    const group_norm::Tiling& tiling = a.tiling;
    int64_t first = unit.sample * tiling.groups + unit.first_group;
    for (int64_t g = 0; g < tiling.unit_groups; ++g) {
        double mean = a.mean[first + g], rstd = a.rstd[first + g];
        auto set = [&](const ChannelOptions<double>& o, auto& values, int64_t i) {
            Affine map = affine(mean, rstd, o);
            store_affine(map, values, i);
            values[3][i] = static_cast<float>(o.weight * (1 + o.scale));
            values[4][i] = static_cast<float>(centre_remainder(map.centre, mean, rstd, o));
        };
        set_coefficients<5>(a.options, tiling, unit, g, coefficients, set);
    }
}

// Returns where dz of a tile is stored between the sums and the map, or null: in dx, or, as that would round it to 16
// bits, in `saved`, which holds the whole unit or is null.
DD_INLINE float* saved_dz(const Backward& a, const Unit& unit, const group_norm::Tile& tile, float* saved) {
    if (a.options.activation == 0) return nullptr;  // dz is dy
    if (a.dx.dtype == DType::float32) return static_cast<float*>(address(a.dx, tile));
    int64_t unit_offset = a.tiling.channels_last ? 0 : unit.first_channel * a.tiling.pixels;
    return saved == nullptr ? nullptr : saved + (tile.offset - unit_offset);
}

// Sums of a few pixels in float32. They are added to sums of the same number of pixels, and last in double, as the
// rounding errors of one long sum would be larger than those of all other arithmetic.
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

// Computes the exponentials of the activation's gradient in a loop of their own: of the operations that a processor can
// have in flight, two loops of short chains overlap more than one loop of long ones.
template <class Activation>
DD_INLINE void set_exponentials(const float* x, int64_t n, const AffineVec& map, float* exponentials) {
    for_blocks<2>(n, [&](auto block, int64_t i, int64_t left) DD_INLINE_LAMBDA {
        Vec z[block.count], e[block.count];
        for (int j = 0; j < block.count; ++j) z[j] = normalised(x + i + j * kLanes, left, map);
        Activation::exponentials(z, e);
        for (int j = 0; j < block.count; ++j) store(exponentials + i + j * kLanes, left, e[j]);
    });
}

// Computes the exponentials for some pixels of all channels.
template <class Activation, int pixels>
DD_INLINE void set_exponentials(const float* x, int64_t channels, const float* coefficients, float* exponentials) {
    for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
        AffineVec map = load_affine(coefficients + c, channels, left);
        Vec z[pixels], e[pixels];
        for (int p = 0; p < pixels; ++p) z[p] = normalised(x + p * channels + c, left, map);
        Activation::exponentials(z, e);
        for (int p = 0; p < pixels; ++p) store(exponentials + p * channels + c, left, e[p]);
    });
}

// Adds a vector of elements to the sums. dz holds the exponentials, unless the activation is the identity, and receives
// dz.
template <class Activation>
DD_INLINE void reduce_vector(const float* x, const float* dy, float* dz, int64_t left, const AffineVec& map,
                             VecSums& sums) {
    Vec d = load(x, left) - map.centre;
    Vec gradient = load(dy, left);
    if constexpr (!Activation::kIdentity) {
        gradient = Activation::gradient(gradient, fma(d, map.gain, map.offset), load(dz, left));
        gradient = keep_some(gradient, left);  // lanes beyond the row have an exponential of 0, and may be NaN
        store(dz, left, gradient);
    }
    sums.add(gradient, d);
}

template <class Activation>
DD_INLINE VecSums reduce_row(const float* x, const float* dy, float* dz, int64_t pixels, const AffineVec& map) {
    constexpr int64_t some = 128;
    VecSums all;
    int64_t i = 0, whole = pixels / kLanes * kLanes;
    while (i < whole) {
        VecSums sums;
        for (int64_t end = i + some < whole ? i + some : whole; i < end; i += kLanes) {
            reduce_vector<Activation>(x + i, dy + i, dz + i, kLanes, map, sums);
        }
        all.add(sums);
    }
    if (whole < pixels) reduce_vector<Activation>(x + whole, dy + whole, dz + whole, pixels - whole, map, all);
    return all;
}

template <class Activation>
DD_INLINE void reduce_rows(const float* x, const float* dy, float* dz, const group_norm::Tile& tile,
                           const float* coefficients, int64_t stride, const ChannelSums& out) {
    int64_t pixels = tile.pixels;
    for (int64_t row = 0; !Activation::kIdentity && row < tile.channels; ++row) {
        set_exponentials<Activation>(x + row * pixels, pixels, splat_affine(coefficients + row, stride),
                                     dz + row * pixels);
    }
    for (int64_t row = 0; row < tile.channels; ++row) {
        int64_t at = row * pixels;
        VecSums sums =
            reduce_row<Activation>(x + at, dy + at, dz + at, pixels, splat_affine(coefficients + row, stride));
        out.dz[row] = sum(sums.dz);
        out.dz_d[row] = sum(sums.dz_d);
    }
}

// Sums over the pixels of all channels; scratch holds 2 floats per channel.
template <class Activation>
DD_INLINE void reduce_pixels(const float* x, const float* dy, float* dz, const group_norm::Tile& tile, bool streams,
                             const float* coefficients, float* scratch, const ChannelSums& out) {
    int64_t channels = tile.channels;
    float *sums_dz = scratch, *sums_dz_d = sums_dz + channels;
    fill(scratch, 2 * channels, 0.0f);
    for_pixels<4>(tile.pixels, streams, [&](auto pixels, int64_t pixel) DD_INLINE_LAMBDA {
        const int64_t first = pixel * channels;
        if constexpr (!Activation::kIdentity)
            set_exponentials<Activation, pixels.count>(x + first, channels, coefficients, dz + first);
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            AffineVec map = load_affine(coefficients + c, channels, left);
            VecSums sums;
            for (int p = 0; p < pixels.count; ++p) {
                int64_t at = first + p * channels + c;
                reduce_vector<Activation>(x + at, dy + at, dz + at, left, map, sums);
            }
            store(sums_dz + c, left, load(sums_dz + c, left) + sums.dz);
            store(sums_dz_d + c, left, load(sums_dz_d + c, left) + sums.dz_d);
        });
    });
    for (int64_t c = 0; c < channels; ++c) out.dz[c] = sums_dz[c];
    for (int64_t c = 0; c < channels; ++c) out.dz_d[c] = sums_dz_d[c];
}

// Sets out.d; scratch holds 2 floats per channel.
DD_INLINE void add_deviations(const Backward& a, const float* x, const group_norm::Tile& tile, const float* centres,
                              float* scratch, const ChannelSums& out) {
    int64_t channels = tile.channels, pixels = tile.pixels;
    if (a.tiling.channels_last) {
        sum_deviations(x, pixels, channels, centres, scratch, scratch + channels);
        for (int64_t c = 0; c < channels; ++c) out.d[c] = scratch[c];
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            out.d[c] = row_deviations(x + c * pixels, 1, pixels, nullptr, centres[c]).sum;
        }
    }
}

template <class Activation>
void reduce_tile(const Backward& a, const Unit& unit, int64_t index, const float* coefficients, double* sums,
                 float* scratch, float* saved) {
    int64_t channels = a.tiling.unit_channels;
    group_norm::Tile tile = a.tiling.tile(unit, index);
    float *x_buffer = scratch + 2 * channels, *dy_buffer = x_buffer + a.tiling.tile_elements();
    const float *x = read_tile(a.x, tile, x_buffer), *dy = read_tile(a.dy, tile, dy_buffer);
    float* dz = saved_dz(a, unit, tile, saved);
    if (dz == nullptr) dz = dy_buffer + a.tiling.tile_elements();  // the map recomputes it
    ChannelSums out(sums, channels, tile.part, tile.first_channel);
    coefficients += tile.first_channel;
    if (a.tiling.channels_last) {
        reduce_pixels<Activation>(x, dy, dz, tile, a.tiling.streams(), coefficients, scratch, out);
    } else {
        reduce_rows<Activation>(x, dy, dz, tile, coefficients, channels, out);
    }
    if (a.dpre_shift != nullptr) add_deviations(a, x, tile, coefficients, scratch, out);
}

void group_norm_backward_reduce(const Backward& a, const Unit& unit, int64_t index, const float* coefficients,
                                double* sums, float* scratch, float* saved) {
    Activations::visit(a.options.activation, [&](auto activation) {
        reduce_tile<decltype(activation)>(a, unit, index, coefficients, sums, scratch, saved);
    });
}

// Replaces dn_from_dz and remainder of a group's channels by slope and level of its GradientMap, and sums.dz_d by sums
// of dz n.
DD_INLINE void finish_group(const ChannelSums& sums, int64_t first, int64_t last, double count, double rstd,
                            float* dn_from_dz, float* remainder) {
    double dn = 0, dn_n = 0;
    for (int64_t c = first; c < last; ++c) {
        double dz_n = sums.dz_d[c] * rstd + sums.dz[c] * remainder[c];
        dn += sums.dz[c] * dn_from_dz[c];
        dn_n += dz_n * dn_from_dz[c];
        sums.dz_d[c] = dz_n;
    }
    for (int64_t c = first; c < last; ++c) {
        GradientMap map = gradient_map(dn / count, dn_n / count, rstd, double{remainder[c]});
        dn_from_dz[c] = map.slope;
        remainder[c] = map.level;
    }
}

// Writes the gradients of the options of a unit's channels, of which the first is `at` of [N C].
DD_INLINE void write_gradients(const Backward& a, const Unit& unit, int64_t at, const ChannelSums& sums,
                               const float* gain, const float* slope, const float* level) {
    const group_norm::Options& o = a.options;
    int64_t channels = a.tiling.unit_channels;
    double pixels = static_cast<double>(a.tiling.pixels), *dz_n = sums.dz_d;
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
    const group_norm::Tiling& tiling = a.tiling;
    int64_t channels = tiling.unit_channels, width = tiling.group_channels;
    int64_t wanted = (a.dpre_shift == nullptr ? 2 : 3) * channels;
    for (int64_t part = 1; part < tiling.parts; ++part) {
        for (int64_t i = 0; i < wanted; ++i) sums[i] += sums[3 * part * channels + i];
    }
    ChannelSums all(sums, channels, 0, 0);
    float *gain = coefficients + channels, *dn_from_dz = gain + 2 * channels, *remainder = dn_from_dz + channels;
    for (int64_t g = 0; g < tiling.unit_groups; ++g) {
        double rstd = a.rstd[unit.sample * tiling.groups + unit.first_group + g];
        double count = static_cast<double>(width * tiling.pixels);
        finish_group(all, g * width, (g + 1) * width, count, rstd, dn_from_dz, remainder);
    }
    write_gradients(a, unit, unit.sample * tiling.channels + unit.first_channel, all, gain, dn_from_dz, remainder);
}

template <class Activation>
DD_INLINE void backward_rows(const float* x, const float* dy, float* dx, const group_norm::Tile& tile,
                             const float* coefficients, int64_t stride) {
    for (int64_t row = 0; row < tile.channels; ++row) {
        const float* c = coefficients + row;
        AffineVec map = splat_affine(c, stride);
        Vec slope = splat(c[3 * stride]), level = splat(c[4 * stride]);
        int64_t start = row * tile.pixels;
        for_blocks(tile.pixels, [&](auto block, int64_t i, int64_t lanes) DD_INLINE_LAMBDA {
            Vec out[block.count];
            for (int j = 0; j < block.count; ++j) {
                int64_t at = start + i + j * kLanes;
                Vec d = load(x + at, lanes) - map.centre;
                Vec dz = activation_gradient<Activation>(load(dy + at, lanes), fma(d, map.gain, map.offset));
                out[j] = fma(dz, map.gain, fma(d, slope, level));
            }
            for (int j = 0; j < block.count; ++j) store(dx + start + i + j * kLanes, lanes, out[j]);
        });
    }
}

template <class Activation>
DD_INLINE void backward_pixels(const float* x, const float* dy, float* dx, const group_norm::Tile& tile, bool streams,
                               const float* coefficients) {
    int64_t channels = tile.channels;
    for_pixels<4>(tile.pixels, streams, [&](auto pixels, int64_t pixel) DD_INLINE_LAMBDA {
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            AffineVec map = load_affine(coefficients + c, channels, left);
            Vec slope = load(coefficients + 3 * channels + c, left);
            Vec level = load(coefficients + 4 * channels + c, left);
            for (int p = 0; p < pixels.count; ++p) {
                int64_t at = (pixel + p) * channels + c;
                Vec d = load(x + at, left) - map.centre;
                Vec dz = activation_gradient<Activation>(load(dy + at, left), fma(d, map.gain, map.offset));
                store(dx + at, left, fma(dz, map.gain, fma(d, slope, level)));
            }
        });
    });
}

// Writes dx of a tile; dz is what the sums have saved, or null.
template <class Activation>
void backward_tile(const Backward& a, const group_norm::Tile& tile, const float* dz, const float* coefficients,
                   float* scratch) {
    float *x_buffer = scratch, *dy_buffer = scratch + a.tiling.tile_elements();
    const float *x = read_tile(a.x, tile, x_buffer), *dy = dz != nullptr ? dz : read_tile(a.dy, tile, dy_buffer);
    float* dx = output_tile(a.dx, tile, dy_buffer);  // dy is read before dx is written, block by block
    if (a.tiling.channels_last) {
        backward_pixels<Activation>(x, dy, dx, tile, a.tiling.streams(), coefficients);
    } else {
        backward_rows<Activation>(x, dy, dx, tile, coefficients + tile.first_channel, a.tiling.unit_channels);
    }
    write_tile(a.dx, tile, dx);
}

void group_norm_backward_map(const Backward& a, const Unit& unit, int64_t index, const float* coefficients,
                             float* scratch, float* saved) {
    group_norm::Tile tile = a.tiling.tile(unit, index);
    const float* dz = saved_dz(a, unit, tile, saved);
    if (dz != nullptr) return backward_tile<Identity>(a, tile, dz, coefficients, scratch);
    Activations::visit(a.options.activation, [&](auto activation) {
        backward_tile<decltype(activation)>(a, tile, nullptr, coefficients, scratch);
    });
}

}  // namespace dd::DD_ISA
