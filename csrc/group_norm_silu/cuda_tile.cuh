// What the kernels of GroupNorm share: a block's place in its tile, and statistics over a tile's groups.
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

// Elements at consecutive addresses, as they lie in memory: 16 bytes of them, or one.
template <DType dtype, bool scalar>
struct Pack {
    static constexpr int kLength = vector_length(dtype);
    uint4 words;

    DD_DEVICE static Pack load(const void* data, int64_t element) {
        return {*reinterpret_cast<const uint4*>(static_cast<const char*>(data) + element * element_size(dtype))};
    }
    // For the last time: it need not stay in the caches.
    DD_DEVICE static Pack load_last(const void* data, int64_t element) {
        return {__ldcs(reinterpret_cast<const uint4*>(static_cast<const char*>(data) + element * element_size(dtype)))};
    }
    DD_DEVICE void floats(float* v) const { unpack<dtype>(words, v); }
    DD_DEVICE static void store(void* data, int64_t element, const float* v) {
        *reinterpret_cast<uint4*>(static_cast<char*>(data) + element * element_size(dtype)) = pack<dtype>(v);
    }
};

template <DType dtype>
struct Pack<dtype, true> {
    static constexpr int kLength = 1;
    float value;

    DD_DEVICE static Pack load(const void* data, int64_t element) { return {load_element(data, element, dtype)}; }
    DD_DEVICE static Pack load_last(const void* data, int64_t element) { return load(data, element); }
    DD_DEVICE void floats(float* v) const { v[0] = value; }
    DD_DEVICE static void store(void* data, int64_t element, const float* v) {
        store_element(data, element, dtype, v[0]);
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
    int64_t first_element, first_channel;  // of the tile; the channel within the sample
    int column, step;
    int pitch;         // odd, so that columns of entries meet no bank conflicts
    Index begin, end;  // of the block's rows
    bool active;       // threads beyond the last whole row of the block do nothing
    bool whole;        // whether all of a vector is in one group

    DD_DEVICE Place(const NormShape& s, const NormPlan& p, unsigned tile, int part) : shape(s), plan(p) {
        const unsigned tiles_per_sample = static_cast<unsigned>(s.channels) / static_cast<unsigned>(p.tile_channels);
        sample = tile / tiles_per_sample;
        first_channel = static_cast<int64_t>(tile % tiles_per_sample) * p.tile_channels;
        first_element = sample * s.channels * s.pixels + first_channel * (s.channels_last ? 1 : s.pixels);
        pitch = p.columns | 1;
        step = kNormThreads / p.columns;
        column = static_cast<int>(threadIdx.x) % p.columns;
        active = static_cast<int>(threadIdx.x) < step * p.columns;
        begin = static_cast<Index>(part * p.rows_each);
        end = static_cast<Index>(p.rows - begin < p.rows_each ? p.rows : begin + p.rows_each);
        whole = access != Access::channels_last || p.group_channels % kLength == 0;
    }

    DD_DEVICE int first_row_in_block() const { return static_cast<int>(threadIdx.x) / plan.columns; }
    DD_DEVICE Index first_row() const { return begin + first_row_in_block(); }
    DD_DEVICE bool has(Index row) const { return active && row < end; }

    // Where a row's vector lies in the whole tensor.
    DD_DEVICE int64_t element(Index row) const {
        if constexpr (access == Access::channels_last) {
            return first_element + row * shape.channels + column * kLength;
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

// What a thread knows of the elements it has seen, by element of its vector: how many each, their mean,
// and the sum of squared deviations from it.
template <int length>
struct Moments {
    float count = 0.0f;
    float mean[length] = {}, m2[length] = {};

    // Chan, Golub and LeVeque (1979).
    DD_DEVICE void merge(const Moments& other) {
        if (other.count == 0.0f) return;
        const float total = count + other.count, weight = other.count / total;
#pragma unroll
        for (int k = 0; k < length; ++k) {
            const float delta = other.mean[k] - mean[k];
            mean[k] = fma(delta, weight, mean[k]);
            m2[k] += fma(delta * delta, count * weight, other.m2[k]);
        }
        count = total;
    }

    // Moments of the whole vector, all of whose elements count alike, in element 0.
    DD_DEVICE void join() {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int k = 0; k < length; ++k) sum += mean[k];
        const float joint = sum / length;
#pragma unroll
        for (int k = 0; k < length; ++k) squares += fma((mean[k] - joint) * (mean[k] - joint), count, m2[k]);
        mean[0] = joint;
        m2[0] = squares;
        count *= length;
    }
};

// The vectors that a thread holds of K rows from first_row on, and their moments with pre_shift added.
template <class Place, int K>
struct Held {
    using Packed = typename Place::Packed;
    using Index = typename Place::Index;
    static constexpr int kLength = Place::kLength;

    Packed packs[K];
    Index first;

    DD_DEVICE Held(const Place& place, const void* data, Index first_row) : first(first_row) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const Index row = first + i * place.step;
            if (place.has(row)) packs[i] = Packed::load(data, place.element(row));
        }
    }

    DD_DEVICE Index row(const Place& place, int i) const { return first + i * place.step; }

    // Element by element of the vector, first the means, then the deviations from them.
    DD_DEVICE Moments<kLength> moments(const Place& place, const float* pre_shift) const {
        Moments<kLength> m;
        const Index left = place.has(first) ? (place.end - first - 1) / place.step + 1 : 0;
        m.count = static_cast<float>(left < K ? left : K);
        if (m.count == 0.0f) return m;
        each(place, pre_shift, [&](int k, float v) { m.mean[k] += v; });
        const float scale = 1.0f / m.count;
#pragma unroll
        for (int k = 0; k < kLength; ++k) m.mean[k] *= scale;
        each(place, pre_shift, [&](int k, float v) { m.m2[k] = fma(v - m.mean[k], v - m.mean[k], m.m2[k]); });
        return m;
    }

private:
    template <class Visit>
    DD_DEVICE void each(const Place& place, const float* pre_shift, const Visit& visit) const {
        const int64_t first_channel = place.sample * place.shape.channels + place.first_channel;
        auto shift_of = [&](int channel) { return pre_shift[first_channel + channel]; };
        float shift[kLength] = {};
        if (pre_shift && place.kSameChannels) place.per_channel(first, shift, shift_of);
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (!place.has(row(place, i))) continue;
            float v[kLength];
            packs[i].floats(v);
            if (pre_shift && !place.kSameChannels) place.per_channel(row(place, i), shift, shift_of);
#pragma unroll
            for (int k = 0; k < kLength; ++k) visit(k, v[k] + shift[k]);
        }
    }
};

// Shared memory of a block: an entry per thread (or per thread and element of its vector), then its groups.
struct NormShared {
    float *entry_mean, *entry_m2;  // [planes][step][pitch]
    float *group_mean, *group_m2;  // [groups], of this block's share
    float *mean, *rstd;            // [groups], of the tile

    static int64_t bytes(const NormShape& shape, const NormPlan& plan) {
        bool whole = plan.access != Access::channels_last || plan.group_channels % shape.vector() == 0;
        int64_t entries = (whole ? 1 : shape.vector()) * (kNormThreads / plan.columns) * (plan.columns | 1);
        return 4 * (2 * entries + 4 * plan.tile_groups);
    }

    template <class Place>
    DD_DEVICE explicit NormShared(const Place& place) {
        const int entries = (place.whole ? 1 : Place::kLength) * place.step * place.pitch;
        const int groups = place.plan.tile_groups;
        entry_mean = shared_memory();
        entry_m2 = entry_mean + entries;
        group_mean = entry_m2 + entries;
        group_m2 = group_mean + groups;
        mean = group_m2 + groups;
        rstd = mean + groups;
    }
};

template <class Place>
DD_DEVICE void store_entries(const Place& place, Moments<Place::kLength> m, const NormShared& shared) {
    if (place.whole) m.join();
    if (!place.active) return;
    const int at = place.first_row_in_block() * place.pitch + place.column;
#pragma unroll
    for (int k = 0; k < Place::kLength; ++k) {
        if (k > 0 && place.whole) break;
        shared.entry_mean[k * place.step * place.pitch + at] = m.mean[k];
        shared.entry_m2[k * place.step * place.pitch + at] = m.m2[k];
    }
}

// The moments of the block's share of each group, from those of its threads: a warp to a group, always
// summed in the same order.
template <class Place>
DD_DEVICE void reduce_block(const Place& place, const Moments<Place::kLength>& m, const NormShared& shared) {
    store_entries(place, m, shared);
    __syncthreads();
    // Members: the vectors, or the elements of vectors, that make up a group's channels.
    const int per_vector = place.whole ? 1 : Place::kLength, elements = Place::kLength / per_vector;
    const int members = place.kSameChannels ? place.plan.group_channels / elements : 1;
    const int lane = threadIdx.x % kWarp, entries = members * place.step;
    const float rows = static_cast<float>(place.end - place.begin);
    for (int group = threadIdx.x / kWarp; group < place.plan.tile_groups; group += kNormThreads / kWarp) {
        auto entry = [&](int i) {
            const int member = group * members + i / place.step;
            return (member % per_vector * place.step + i % place.step) * place.pitch + member / per_vector;
        };
        float sum = 0.0f, squares = 0.0f;
        for (int i = lane; i < entries; i += kWarp) {
            sum = fma(shared.entry_mean[entry(i)], static_cast<float>(place.rows_of(i % place.step)), sum);
        }
        const float mean = warp_sum(sum) / (rows * static_cast<float>(members));
        for (int i = lane; i < entries; i += kWarp) {
            const float delta = shared.entry_mean[entry(i)] - mean;
            const float count = static_cast<float>(place.rows_of(i % place.step) * elements);
            if (count != 0.0f) squares += fma(delta * delta, count, shared.entry_m2[entry(i)]);
        }
        squares = warp_sum(squares);
        if (lane == 0) {
            shared.group_mean[group] = mean;
            shared.group_m2[group] = squares;
        }
    }
}

// mean and rstd of a tile's group from the shares of `parts` blocks, the last of which may be smaller.
// load(part, &mean, &m2) reads a share.
template <class Place, class Load>
DD_DEVICE void combine_parts(const Place& place, int parts, float eps, const Load& load, float& mean, float& rstd) {
    const NormPlan& plan = place.plan;
    const float total = static_cast<float>(plan.rows);
    auto rows = [&](int part) {
        const int64_t left = plan.rows - part * plan.rows_each;
        return static_cast<float>(left < plan.rows_each ? left : plan.rows_each);
    };
    float sum = 0.0f, squares = 0.0f, part_mean, part_m2;
    for (int part = 0; part < parts; ++part) {
        load(part, part_mean, part_m2);
        sum = fma(part_mean, rows(part) / total, sum);
    }
    const float elements_per_row = static_cast<float>(place.kSameChannels ? plan.group_channels : place.kLength);
    for (int part = 0; part < parts; ++part) {
        load(part, part_mean, part_m2);
        squares += fma((part_mean - sum) * (part_mean - sum), rows(part) * elements_per_row, part_m2);
    }
    mean = sum;
    rstd = 1.0f / sqrt(squares / (total * elements_per_row) + eps);
}

template <DType dtype>
DD_DEVICE float normalise(float x, const Affine& map, bool silu) {
    return activate<dtype>(fma(x - map.centre, map.gain, map.offset), silu);
}

// The affine maps of the channels of one row's vector.
template <class Place>
DD_DEVICE void load_affines(const Place& place, const NormOptions& o, const NormShared& shared,
                            typename Place::Index row, Affine (&affines)[Place::kLength]) {
    place.per_channel(row, affines, [&](int channel) {
        const int group = place.group(channel);
        return affine(shared.mean[group], shared.rstd[group],
                      channel_options(o, place.shape, place.sample, place.first_channel + channel));
    });
}

// Writes a row's output from its vector as loaded.
template <DType dtype, class Place>
DD_DEVICE void finish_row(const Place& place, const NormForward& a, typename Place::Index row,
                          const typename Place::Packed& x, const Affine (&affines)[Place::kLength]) {
    float v[Place::kLength];
    x.floats(v);
#pragma unroll
    for (int k = 0; k < Place::kLength; ++k) v[k] = normalise<dtype>(v[k], affines[k], a.options.silu);
    Place::Packed::store(a.y, place.element(row), v);
}

}  // namespace dd::cuda
