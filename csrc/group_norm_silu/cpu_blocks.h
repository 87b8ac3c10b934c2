// Loops over vectors, for the forward and the backward kernels. Read once per instruction set.

#include "group_norm_silu/formula.h"

namespace dd::DD_ISA {

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

DD_INLINE ChannelOptions<double> channel_options(const group_norm::Options& o, const group_norm::Cut& cut, int64_t unit,
                                                 int64_t channel) {
    int64_t c = cut.first_channel(unit) + channel, row = cut.sample(unit) * cut.channels + c;
    auto value = [](const float* p, int64_t i, double absent) { return p == nullptr ? absent : p[i]; };
    return {value(o.weight, c, 1), value(o.bias, c, 0), value(o.pre_shift, row, 0), value(o.scale, row, 0),
            value(o.shift, row, 0)};
}

}  // namespace dd::DD_ISA
