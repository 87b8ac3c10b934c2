// Loops over vectors, for the forward and the backward kernels. Read once per instruction set.

#include "group_norm_silu/formula.h"

namespace dd::DD_ISA {

using group_norm::Unit;

template <int n>
struct Count {
    static constexpr int count = n;
};

// visit(Count, first element, lanes): some vectors at a time, whose long chains of operations then
// overlap, single ones, and a last one of fewer lanes.
template <int some = 4, class Visit>
DD_INLINE void for_blocks(int64_t n, Visit visit) {
    int64_t i = 0;
    for (; i + some * kLanes <= n; i += some * kLanes) visit(Count<some>{}, i, int64_t{kLanes});
    for (; i + kLanes <= n; i += kLanes) visit(Count<1>{}, i, int64_t{kLanes});
    if (i < n) visit(Count<1>{}, i, n - i);
}

// visit(Count, first pixel): four pixels at a time, so that what is per channel is read a quarter as often.
template <class Visit>
DD_INLINE void for_pixels(int64_t pixels, Visit visit) {
    int64_t pixel = 0;
    for (; pixel + 4 <= pixels; pixel += 4) visit(Count<4>{}, pixel);
    for (; pixel < pixels; ++pixel) visit(Count<1>{}, pixel);
}

DD_INLINE Vec load_some(const float* p, int64_t lanes) { return lanes == kLanes ? load(p) : load_first(p, lanes); }

DD_INLINE void store_some(float* p, int64_t lanes, Vec v) {
    if (lanes == kLanes) {
        store(p, v);
    } else {
        store_first(p, lanes, v);
    }
}

// The other lanes become 0, whatever they were.
DD_INLINE Vec keep_first(Vec v, int64_t lanes) {
    if (lanes == kLanes) return v;
    Vec kept{};
    __builtin_memcpy(&kept, &v, static_cast<size_t>(lanes) * sizeof(float));
    return kept;
}

// Affine, lane by lane.
struct Line {
    Vec centre, gain, offset;
};

DD_INLINE Line line_of(const float* coefficients, int64_t channels, int64_t lanes) {
    return {load_some(coefficients, lanes), load_some(coefficients + channels, lanes),
            load_some(coefficients + 2 * channels, lanes)};
}

DD_INLINE void fill(float* p, int64_t n, float value) {
    for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// The options of up to eight channels, absent ones as what changes nothing: loops over them have no branch.
struct OptionBlock {
    static constexpr int64_t size = 8;
    float weight[size], bias[size], pre_shift[size], scale[size], shift[size];

    DD_INLINE OptionBlock(const group_norm::Options& o, const group_norm::Cut& cut, const Unit& unit, int64_t channel,
                          int64_t n) {
        int64_t c = unit.first_channel + channel, row = unit.sample * cut.channels + c;
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

// visit(options, first channel, channels) over the channels of a group of the unit, a block at a time.
template <class Visit>
DD_INLINE void for_options(const group_norm::Options& options, const group_norm::Cut& cut, const Unit& unit,
                           int64_t group, Visit visit) {
    int64_t end = (group + 1) * cut.group_channels;
    for (int64_t c = group * cut.group_channels; c < end; c += OptionBlock::size) {
        int64_t n = end - c < OptionBlock::size ? end - c : OptionBlock::size;
        visit(OptionBlock(options, cut, unit, c, n), c, n);
    }
}

// The affine maps of a group's channels, to coefficients: centre, gain and offset, each of all channels of the unit.
DD_INLINE void set_lines(const group_norm::Options& options, const group_norm::Cut& cut, const Unit& unit,
                         int64_t group, double mean, double rstd, float* coefficients) {
    for_options(options, cut, unit, group, [&](const OptionBlock& block, int64_t c, int64_t n) {
        float centre[OptionBlock::size], gain[OptionBlock::size], offset[OptionBlock::size];
        for (int64_t i = 0; i < OptionBlock::size; ++i) {
            Affine line = affine(mean, rstd, block[i]);
            centre[i] = line.centre;
            gain[i] = line.gain;
            offset[i] = line.offset;
        }
        float* to[] = {coefficients + c, coefficients + cut.unit_channels + c,
                       coefficients + 2 * cut.unit_channels + c};
        for (int64_t i = 0; i < n; ++i) {
            to[0][i] = centre[i];
            to[1][i] = gain[i];
            to[2][i] = offset[i];
        }
    });
}

}  // namespace dd::DD_ISA
