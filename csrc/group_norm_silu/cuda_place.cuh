// A thread's place in a tile, and what it finds there.
#pragma once

#include "common/cuda_device.cuh"
#include "common/cuda_launch.h"
#include "common/cuda_math.cuh"
#include "group_norm_silu/cuda.h"
#include "group_norm_silu/formula.h"

namespace dd::cuda {

// The value of a 16-bit SiLU, to 2^-21: two instructions of the special function unit, where a float is
// computed by the polynomial and division of vec_math.h.
struct Approximate {
    float v;
};

DD_DEVICE Approximate one_plus_exp_minus(Approximate z) { return {1.0f + fast_exp2(z.v * -1.44269504f)}; }
DD_DEVICE Approximate operator/(Approximate a, Approximate b) { return {a.v * fast_reciprocal(b.v)}; }
DD_DEVICE Approximate operator/(float a, Approximate b) { return {a * fast_reciprocal(b.v)}; }
DD_DEVICE Approximate operator*(Approximate a, Approximate b) { return {a.v * b.v}; }
DD_DEVICE Approximate operator-(float a, Approximate b) { return {a - b.v}; }
DD_DEVICE Approximate fma(Approximate a, Approximate b, float c) { return {fma(a.v, b.v, c)}; }

template <DType dtype>
DD_DEVICE float activate(float z, bool silu) {
    if (!silu) return z;
    if constexpr (dtype == DType::float32) return activation<true>(z);
    // Where e^-z overflows, z / inf would be 0 times the reciprocal of inf: -0, as it should be.
    return activation<true>(Approximate{z}).v;
}

template <DType dtype>
DD_DEVICE float normalise(float x, const Affine& map, bool silu) {
    return activate<dtype>(fma(x - map.centre, map.gain, map.offset), silu);
}

// Elements at consecutive addresses, as they lie in memory: 16 bytes of them, or one.
template <DType dtype, bool scalar>
struct Pack {
    static constexpr int kLength = vector_length(dtype);
    uint4 words;

    template <bool last = false>
    DD_DEVICE static Pack load(const void* data, int64_t element) {
        auto* p = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + element * element_size(dtype));
        if constexpr (last) return {__ldcs(p)};
        return {*p};
    }
    DD_DEVICE void floats(float* v) const { unpack<dtype>(words, v); }

    // last: nothing here will read it again.
    template <bool last = false>
    DD_DEVICE void store(void* data, int64_t element) const {
        auto* p = reinterpret_cast<uint4*>(static_cast<char*>(data) + element * element_size(dtype));
        if constexpr (last) {
            __stcs(p, words);
        } else {
            *p = words;
        }
    }
    DD_DEVICE static Pack of(const float* v) { return {pack<dtype>(v)}; }
};

template <DType dtype>
struct Pack<dtype, true> {
    static constexpr int kLength = 1;
    float value;

    template <bool last = false>
    DD_DEVICE static Pack load(const void* data, int64_t element) {
        return {load_element(data, element, dtype)};
    }
    DD_DEVICE void floats(float* v) const { v[0] = value; }

    template <bool last = false>
    DD_DEVICE void store(void* data, int64_t element) const {
        store_element(data, element, dtype, value);
    }
    DD_DEVICE static Pack of(const float* v) { return {round_to<dtype>(v[0])}; }
};

// Rounded to their dtype.
template <class Packed>
DD_DEVICE Packed operator+(const Packed& a, const Packed& b) {
    float v[Packed::kLength], w[Packed::kLength];
    a.floats(v);
    b.floats(w);
#pragma unroll
    for (int k = 0; k < Packed::kLength; ++k) v[k] += w[k];
    return Packed::of(v);
}

// Where something of cat([x, skip], 1), which is never made, lies: in which of the two, and where there.
struct Part {
    bool in_skip;
    int channels;  // of the one it lies in
    int64_t element;

    // Each of the two lies as [outer][its channels][inner].
    DD_DEVICE Part(const NormShape& s, bool in_skip, int64_t outer, int64_t channel, int64_t inner) : in_skip(in_skip) {
        channels = static_cast<int>(in_skip ? s.channels - s.x_channels : s.x_channels);
        element = (outer * channels + channel - (in_skip ? s.x_channels : 0)) * inner;
    }

    template <class Data>
    DD_DEVICE Data* of(Data* x, Data* skip) const {
        return in_skip ? skip : x;
    }
};

template <Access access>
using RowIndex = std::conditional_t<access == Access::scalar, int64_t, int>;

// A thread's place in a tile: one column of it, and every step-th row of a block's share.
template <DType dtype, Access access_>
struct Place {
    static constexpr Access access = access_;
    using Packed = Pack<dtype, access == Access::scalar>;
    using Index = RowIndex<access>;
    static constexpr int kLength = Packed::kLength;

    const NormShape& shape;
    const NormPlan& plan;
    unsigned sample;
    int first_channel;  // of the tile, within the sample
    int64_t first_element;
    int column, step;
    int pitch;         // odd, so that columns of entries meet no bank conflicts
    Index begin, end;  // of the block's rows
    Index seam;        // rows from here on are skip's, unless channels are last
    bool active;       // threads beyond the last whole row of the block do nothing
    bool whole;        // whether all of a vector is in one group

    DD_DEVICE Place(const NormShape& s, const NormPlan& p, unsigned tile, int part) : shape(s), plan(p) {
        const unsigned tiles_per_sample = static_cast<unsigned>(s.channels) / static_cast<unsigned>(p.tile_channels);
        sample = tile / tiles_per_sample;
        first_channel = static_cast<int>(tile % tiles_per_sample) * p.tile_channels;
        first_element = (sample * s.channels + (s.channels_last ? 0 : first_channel)) * s.pixels;
        if (s.channels_last) first_element += first_channel;
        pitch = p.columns | 1;
        step = kNormThreads / p.columns;
        column = static_cast<int>(threadIdx.x) % p.columns;
        active = static_cast<int>(threadIdx.x) < step * p.columns;
        begin = static_cast<Index>(part * p.rows_each);
        end = static_cast<Index>(p.rows - begin < p.rows_each ? p.rows : begin + p.rows_each);
        const int64_t rows_of_x = (s.x_channels - first_channel) * s.pixels / kLength;
        seam = static_cast<Index>(rows_of_x < p.rows ? rows_of_x : p.rows);
        whole = access != Access::channels_last || p.group_channels % kLength == 0;
    }

    DD_DEVICE int first_row_in_block() const { return static_cast<int>(threadIdx.x) / plan.columns; }
    DD_DEVICE Index first_row() const { return begin + first_row_in_block(); }
    DD_DEVICE bool has(Index row) const { return active && row < end; }

    // Where a row's vector lies in the whole tensor.
    DD_DEVICE int64_t element(Index row) const {
        if constexpr (access == Access::channels_last) {
            return first_element + static_cast<int64_t>(row) * static_cast<int>(shape.channels) + column * kLength;
        } else if constexpr (access == Access::contiguous) {
            return first_element + static_cast<int64_t>(row) * kLength;
        } else {
            if (!shape.channels_last) return first_element + row;
            return first_element + row / plan.group_channels * shape.channels + row % plan.group_channels;
        }
    }

    // The channel, within the tile, of the first element of a row's vector; the others are in the same
    // channel or, where channels are last, in those that follow.
    DD_DEVICE int channel(Index row) const {
        if constexpr (access == Access::channels_last) {
            return column * kLength;
        } else if constexpr (access == Access::contiguous) {
            return static_cast<int>(static_cast<unsigned>(row * kLength) / static_cast<unsigned>(shape.pixels));
        } else {
            return static_cast<int>(shape.channels_last ? row % plan.group_channels : row / shape.pixels);
        }
    }

    DD_DEVICE int group(int channel) const {
        return access == Access::channels_last ? channel / plan.group_channels : 0;
    }

    // Where it lies in x and skip, whose concatenation that tensor is.
    DD_DEVICE Part part(Index row) const {
        if constexpr (access == Access::channels_last) {
            const int64_t channel = first_channel + column * kLength;
            Part part(shape, channel >= shape.x_channels, sample * shape.pixels, channel, 1);
            part.element += static_cast<int64_t>(row) * part.channels;
            return part;
        } else {
            if (access == Access::scalar && shape.channels_last) {
                const int64_t channel = first_channel + row % plan.group_channels;
                const int64_t pixel = row / plan.group_channels;
                return {shape, channel >= shape.x_channels, sample * shape.pixels + pixel, channel, 1};
            }
            Part part(shape, row >= seam, sample, first_channel, shape.pixels);
            part.element += static_cast<int64_t>(row) * kLength;
            return part;
        }
    }

    // A group of the tile, counted over all samples.
    DD_DEVICE int64_t group_in_tensor(int group) const {
        return sample * shape.groups + first_channel / plan.group_channels + group;
    }

    // values[k] = load(channel) for every element of a row's vector.
    template <class Value, class Load>
    DD_DEVICE void per_channel(Index row, Value (&values)[kLength], const Load& load) const {
        const int first = channel(row);
        values[0] = load(first);
#pragma unroll
        for (int k = 1; k < kLength; ++k) {
            if constexpr (access == Access::channels_last) {
                values[k] = load(first + k);
            } else {
                values[k] = values[0];
            }
        }
    }

    // How many rows the thread (of any column) whose first row in the block is `first` has.
    DD_DEVICE Index rows_of(int first) const { return first < end - begin ? (end - begin - first - 1) / step + 1 : 0; }

    // Whether each row's channels are those of every other row.
    static constexpr bool kSameChannels = access == Access::channels_last;
};

// A parameter [C], or [N, C] of a sample; `otherwise` where there is none.
DD_DEVICE float parameter(const float* values, int64_t i, float otherwise) {
    return values == nullptr ? otherwise : values[i];
}

// channel: within the sample.
DD_DEVICE ChannelOptions<float> channel_options(const NormOptions& o, const NormShape& s, unsigned sample,
                                                int64_t channel) {
    const int64_t i = sample * s.channels + channel;
    return {parameter(o.weight, channel, 1.0f), parameter(o.bias, channel, 0.0f), parameter(o.pre_shift, i, 0.0f),
            parameter(o.scale, i, 0.0f), parameter(o.shift, i, 0.0f)};
}

// 1 / sqrt(v), by one step of Newton's from that of two roundings, the residual kept exact: NaN where v is 0 or inf.
DD_DEVICE float reciprocal_sqrt(float v) {
    const float r = 1.0f / sqrt(v), product = v * r;
    const float residual = fma(-product, r, 1.0f) - fma(v, r, -product) * r;
    return residual == residual ? fma(0.5f * r, residual, r) : r;
}

// What rounding took from the centre (Knuth's exact sum of two floats) comes back in the offset.
DD_DEVICE Affine exact_affine(float mean, float rstd, const ChannelOptions<float>& o) {
    Affine map = affine(mean, rstd, o);
    const float shift = map.centre - mean;
    const float lost = (mean - (map.centre - shift)) - (o.pre_shift + shift);
    map.offset = fma(-lost, map.gain, map.offset);
    return map;
}

}  // namespace dd::cuda
