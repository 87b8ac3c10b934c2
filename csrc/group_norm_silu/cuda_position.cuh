// Locates a thread's rows: in its tile, in the tensors and in their virtual concatenation; and loads what lies there.
#pragma once

#include "common/cuda_device.cuh"
#include "common/cuda_launch.h"
#include "group_norm_silu/cuda.h"
#include "group_norm_silu/cuda_activation.cuh"
#include "group_norm_silu/formula.h"

namespace dd::cuda {

// Elements at consecutive addresses in the format of memory: 16 bytes of them, or one.
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

    // last: no later access of this kernel reads the bytes, so that they need not stay in the caches.
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

// Adds elements, and rounds the sums to their dtype.
template <class Packed>
DD_DEVICE Packed operator+(const Packed& a, const Packed& b) {
    float v[Packed::kLength], w[Packed::kLength];
    a.floats(v);
    b.floats(w);
#pragma unroll
    for (int k = 0; k < Packed::kLength; ++k) v[k] += w[k];
    return Packed::of(v);
}

// Locates an element of the virtual concatenation [x, skip]: which tensor, and the offset in it.
struct ConcatElement {
    bool in_skip;
    int channels;  // of that tensor
    int64_t element;

    // Each tensor is [outer][its channels][inner] in memory.
    DD_DEVICE ConcatElement(const NormShape& s, bool in_skip, int64_t outer, int64_t channel, int64_t inner)
        : in_skip(in_skip) {
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

// A thread's position in a tile: one column, and every step-th row of its block's partition.
template <DType dtype, Access access_>
struct Position {
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
    Index seam;        // the first row of skip, unless channels are last
    bool active;       // threads beyond the last whole row of the block do nothing
    bool whole;        // whether all of a vector is in one group

    DD_DEVICE Position(const NormShape& s, const NormPlan& p, unsigned tile, int part) : shape(s), plan(p) {
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

    // Returns the offset of a row's vector in the whole tensor.
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

    // Locates the first element of a row's vector in the virtual concatenation of x and skip.
    DD_DEVICE ConcatElement concat_element(Index row) const {
        if constexpr (access == Access::channels_last) {
            const int64_t channel = first_channel + column * kLength;
            ConcatElement part(shape, channel >= shape.x_channels, sample * shape.pixels, channel, 1);
            part.element += static_cast<int64_t>(row) * part.channels;
            return part;
        } else {
            if (access == Access::scalar && shape.channels_last) {
                const int64_t channel = first_channel + row % plan.group_channels;
                const int64_t pixel = row / plan.group_channels;
                return {shape, channel >= shape.x_channels, sample * shape.pixels + pixel, channel, 1};
            }
            ConcatElement part(shape, row >= seam, sample, first_channel, shape.pixels);
            part.element += static_cast<int64_t>(row) * kLength;
            return part;
        }
    }

    // The index of a group of the tile among the groups of all samples.
    DD_DEVICE int64_t group_in_tensor(int group) const {
        return sample * shape.groups + first_channel / plan.group_channels + group;
    }

    // Sets values[k] = load(channel) for every element of a row's vector.
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

    // The number of rows of a thread (of any column) whose first row in the block is `first`.
    DD_DEVICE Index rows_of(int first) const { return first < end - begin ? (end - begin - first - 1) / step + 1 : 0; }

    // Whether all rows have the same channels.
    static constexpr bool kSameChannels = access == Access::channels_last;
};

// Returns values[i], or `otherwise` where there are none.
DD_DEVICE float parameter(const float* values, int64_t i, float otherwise) {
    return values == nullptr ? otherwise : values[i];
}

// Returns the options of a channel, which is counted within the sample.
DD_DEVICE ChannelOptions<float> channel_options(const Options& o, const NormShape& s, unsigned sample,
                                                int64_t channel) {
    const int64_t i = sample * s.channels + channel;
    return {parameter(o.weight, channel, 1.0f), parameter(o.bias, channel, 0.0f), parameter(o.pre_shift, i, 0.0f),
            parameter(o.scale, i, 0.0f), parameter(o.shift, i, 0.0f)};
}

// Returns 1 / sqrt(v) to half an ulp and a little: one step of Newton's method, with an exact residual, from the value
// of two roundings, which stays where v is 0 and the step gives NaN. Returns NaN for inf, a variance of squares beyond
// float32: 0 would make y the bias.
DD_DEVICE float reciprocal_sqrt(float v) {
    const float r = 1.0f / sqrt(v), product = v * r;
    const float residual = fma(-product, r, 1.0f) - fma(v, r, -product) * r;
    return residual == residual ? fma(0.5f * r, residual, r) : r + (v - v);
}

// Adds the rounding error of the centre, by Knuth's exact sum of two floats, to the offset.
DD_DEVICE Affine exact_affine(float mean, float rstd, const ChannelOptions<float>& o) {
    Affine map = affine(mean, rstd, o);
    const float shift = map.centre - mean;
    const float lost = (mean - (map.centre - shift)) - (o.pre_shift + shift);
    map.offset = fma(-lost, map.gain, map.offset);
    return map;
}

}  // namespace dd::cuda
