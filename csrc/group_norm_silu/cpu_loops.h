// Loops over vectors that the forward and the backward kernels share. Read once per instruction set.

#include "common/activation.h"
#include "group_norm_silu/formula.h"

namespace dd::DD_ISA {

using group_norm::Unit;

template <int n>
struct Count {
    static constexpr int count = n;
};

// Calls visit(Count, first element, lanes) for `some` vectors at a time, whose long chains of operations then overlap,
// for single ones, and for a last one of fewer lanes.
template <int some = 4, class Visit>
DD_INLINE void for_blocks(int64_t n, Visit visit) {
    int64_t i = 0;
    for (; i + some * kLanes <= n; i += some * kLanes) visit(Count<some>{}, i, int64_t{kLanes});
    for (; i + kLanes <= n; i += kLanes) visit(Count<1>{}, i, int64_t{kLanes});
    if (i < n) visit(Count<1>{}, i, n - i);
}

// Calls visit(Count, first pixel) for `some` pixels at a time, so that values per channel are read less often; for each
// pixel alone where `streams`: they come from memory then, whose prefetcher follows its order.
template <int some, class Visit>
DD_INLINE void for_pixels(int64_t pixels, bool streams, Visit visit) {
    int64_t pixel = 0;
    for (; !streams && pixel + some <= pixels; pixel += some) visit(Count<some>{}, pixel);
    for (; pixel < pixels; ++pixel) visit(Count<1>{}, pixel);
}

DD_INLINE Vec keep_some(Vec v, int64_t lanes) { return lanes >= kLanes ? v : keep_first(v, lanes); }

// An Affine of each lane.
struct AffineVec {
    Vec centre, gain, offset;
};

DD_INLINE AffineVec load_affine(const float* coefficients, int64_t channels, int64_t lanes) {
    return {load(coefficients, lanes), load(coefficients + channels, lanes), load(coefficients + 2 * channels, lanes)};
}

// The same Affine in every lane; centre, gain and offset are `stride` floats apart.
DD_INLINE AffineVec splat_affine(const float* coefficients, int64_t stride) {
    return {splat(coefficients[0]), splat(coefficients[stride]), splat(coefficients[2 * stride])};
}

DD_INLINE Vec normalised(const float* x, int64_t lanes, const AffineVec& map) {
    return fma(load(x, lanes) - map.centre, map.gain, map.offset);
}

DD_INLINE void fill(float* p, int64_t n, float value) {
    for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// The options of up to eight channels, with neutral values for absent options, so that loops over them have no branch.
struct OptionBlock {
    static constexpr int64_t size = 8;
    float weight[size], bias[size], pre_shift[size], scale[size], shift[size];

    DD_INLINE OptionBlock(const group_norm::Options& o, const group_norm::Tiling& tiling, const Unit& unit,
                          int64_t channel, int64_t n) {
        int64_t c = unit.first_channel + channel, row = unit.sample * tiling.channels + c;
        set(weight, o.weight, c, n, 1.0f);
        set(bias, o.bias, c, n, 0.0f);
        set(pre_shift, o.pre_shift, row, n, 0.0f);
        set(scale, o.scale, row, n, 0.0f);
        set(shift, o.shift, row, n, 0.0f);
    }

    DD_INLINE ChannelOptions<double> operator[](int64_t i) const {
        return {weight[i], bias[i], pre_shift[i], scale[i], shift[i]};
    }

private:
    DD_INLINE static void set(float* to, const float* from, int64_t at, int64_t n, float absent) {
        if (from != nullptr && n == size) {
            __builtin_memcpy(to, from + at, sizeof(float) * size);
            return;
        }
        fill(to, size, absent);
        for (int64_t i = 0; from != nullptr && i < n; ++i) to[i] = from[at + i];
    }
};

// Calls visit(options, first channel, channels) for the channels of a group of the unit, a block at a time.
template <class Visit>
DD_INLINE void for_options(const group_norm::Options& options, const group_norm::Tiling& tiling, const Unit& unit,
                           int64_t group, Visit visit) {
    int64_t end = (group + 1) * tiling.group_channels;
    for (int64_t c = group * tiling.group_channels; c < end; c += OptionBlock::size) {
        int64_t n = end - c < OptionBlock::size ? end - c : OptionBlock::size;
        visit(OptionBlock(options, tiling, unit, c, n), c, n);
    }
}

// Copies up to OptionBlock::size floats.
DD_INLINE void copy_block(const float* from, int64_t n, float* to) {
    if (n == OptionBlock::size) {
        __builtin_memcpy(to, from, sizeof(float) * OptionBlock::size);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    }
}

// Computes the n coefficients of each channel of a group: set(options, values, i) sets values[k][i], the k-th of
// channel i of a block; coefficients is [n][unit_channels].
template <int n, class Set>
DD_INLINE void set_coefficients(const group_norm::Options& options, const group_norm::Tiling& tiling, const Unit& unit,
                                int64_t group, float* coefficients, Set set) {
    for_options(options, tiling, unit, group, [&](const OptionBlock& block, int64_t c, int64_t count) {
        float values[n][OptionBlock::size];
        for (int64_t i = 0; i < OptionBlock::size; ++i) set(block[i], values, i);
        for (int64_t k = 0; k < n; ++k) copy_block(values[k], count, coefficients + k * tiling.unit_channels + c);
    });
}

// Stores an affine map as the first three coefficients of a channel.
template <int n>
DD_INLINE void store_affine(const Affine& map, float (&values)[n][OptionBlock::size], int64_t i) {
    values[0][i] = map.centre;
    values[1][i] = map.gain;
    values[2][i] = map.offset;
}

// Sums of d = value - centre and of d^2.
struct Deviations {
    double sum, squares;

    // Returns whether the centre is so far from the mean that the distance makes up more than half of the squares.
    DD_INLINE bool off_centre(double count) const { return 2 * sum * sum > count * squares; }
};

DD_INLINE Deviations row_deviations(const float* x, int64_t rows, int64_t length, const float* pre_shift,
                                    float centre) {
    Vec sums[4] = {}, squares[4] = {};
    for (int64_t row = 0; row < rows; ++row) {
        Vec from = splat(pre_shift == nullptr ? centre : centre - pre_shift[row]);
        for_blocks(length, [&](auto block, int64_t i, int64_t lanes) DD_INLINE_LAMBDA {
            for (int j = 0; j < block.count; ++j) {
                Vec d = keep_some(load(x + row * length + i + j * kLanes, lanes) - from, lanes);
                sums[j] += d;
                squares[j] = fma(d, d, squares[j]);
            }
        });
    }
    return {sum((sums[0] + sums[1]) + (sums[2] + sums[3])), sum((squares[0] + squares[1]) + (squares[2] + squares[3]))};
}

// Computes, per channel c, sums[c] of d = x[pixel][c] - centres[c] over the pixels, and squares[c] of d^2. Later pixels
// are fetched, as the processor's prefetcher does not follow this order: into the second-level cache, since too few
// lines may be on their way to the first one to hide memory's latency.
DD_INLINE void sum_deviations(const float* x, int64_t pixels, int64_t channels, const float* centres, float* sums,
                              float* squares) {
    constexpr int64_t ahead = 32;
    fill(sums, channels, 0.0f);
    fill(squares, channels, 0.0f);
    for_pixels<8>(pixels, false, [&](auto rows, int64_t pixel) DD_INLINE_LAMBDA {
        for_vectors(channels, [&](int64_t c, int64_t left) DD_INLINE_LAMBDA {
            Vec total{}, square{}, centre = load(centres + c, left);
            for (int r = 0; r < rows.count; ++r) {
                const float* from = x + (pixel + r) * channels + c;
                if constexpr (rows.count > 1) __builtin_prefetch(from + ahead * channels, 0, 2);
                Vec d = load(from, left) - centre;
                total += d;
                square = fma(d, d, square);
            }
            store(sums + c, left, load(sums + c, left) + total);
            store(squares + c, left, load(squares + c, left) + square);
        });
    });
}

}  // namespace dd::DD_ISA
