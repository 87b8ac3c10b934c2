// What the kernels of GroupNorm share: the vectors that a thread holds, and statistics over a tile's groups.
#pragma once

#include "group_norm_silu/cuda_place.cuh"

namespace dd::cuda {

// What a thread knows of the elements it has seen, by element of its vector: how many each, their mean,
// and the sum of squared deviations from it.
template <int length>
struct Moments {
    float count = 0.0f;
    float mean[length] = {}, m2[length] = {};

    // Chan, Golub and LeVeque (1979); the other has seen something.
    DD_DEVICE void merge(const Moments& other) {
        const float total = count + other.count, weight = other.count / total;
#pragma unroll
        for (int k = 0; k < length; ++k) {
            const float delta = other.mean[k] - mean[k];
            mean[k] = fma(delta, weight, mean[k]);
            m2[k] += fma(delta * (count * weight), delta, other.m2[k]);  // a square could overflow, and be times 0
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
// last: this is their last reading, so that they need not stay in the caches.
template <class Place, int K, bool last = false>
struct Held {
    using Packed = typename Place::Packed;
    using Index = typename Place::Index;
    static constexpr int kLength = Place::kLength;

    Packed packs[K];
    Index first;

    DD_DEVICE Held(const Place& place, const void* data, Index first_row) : first(first_row) {
        load(place, [&](Index row) { return Packed::template load<last>(data, place.element(row)); });
    }

    // Of cat([x, skip], 1); skip may be null.
    DD_DEVICE Held(const Place& place, const void* x, const void* skip, Index first_row) : first(first_row) {
        load(place, [&](Index row) {
            const Part part = place.part(row);
            return Packed::template load<last>(part.of(x, skip), part.element);
        });
    }

    DD_DEVICE Index row(const Place& place, int i) const { return first + i * place.step; }

    // To what is x's; the sum is written too.
    DD_DEVICE void add(const Place& place, const void* residual, void* sum) {
        visit_x(place,
                [&](int i, int64_t element) { packs[i] = packs[i] + Packed::template load<true>(residual, element); });
        visit_x(place, [&](int i, int64_t element) { packs[i].store(sum, element); });
    }

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
    template <class Load>
    DD_DEVICE void load(const Place& place, const Load& load_row) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (place.has(row(place, i))) packs[i] = load_row(row(place, i));
        }
    }

    // visit(i, element) of every vector that lies in x.
    template <class Visit>
    DD_DEVICE void visit_x(const Place& place, const Visit& visit) const {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (!place.has(row(place, i))) continue;
            const Part part = place.part(row(place, i));
            if (!part.in_skip) visit(i, part.element);
        }
    }

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

// leave(group, mean, m2) for each group: the moments of the block's share of it, from those of its threads, a warp
// to a group, always summed in the same order.
template <class Place, class Leave>
DD_DEVICE void reduce_block(const Place& place, const Moments<Place::kLength>& m, const NormShared& shared,
                            const Leave& leave) {
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
            squares += fma(delta * count, delta, shared.entry_m2[entry(i)]);
        }
        squares = warp_sum(squares);
        if (lane == 0) leave(group, mean, squares);
    }
}

// Elements that a row of a tile has in each of its groups.
template <class Place>
DD_DEVICE float elements_per_row(const Place& place) {
    return static_cast<float>(place.kSameChannels ? place.plan.group_channels : place.kLength);
}

template <class Place>
DD_DEVICE float rstd_of(const Place& place, float m2, float eps) {
    return reciprocal_sqrt(m2 / (static_cast<float>(place.plan.rows) * elements_per_row(place)) + eps);
}

// keep(group, mean, rstd) for each of a tile's groups, from the shares of `parts` blocks, the last of which may be
// smaller: a warp to a group, a lane to a share, so that all shares are on their way at once.
// load(group, part, mean, m2) reads one.
template <class Place, class Load, class Keep>
DD_DEVICE void combine_parts(const Place& place, int parts, float eps, const Load& load, const Keep& keep) {
    const NormPlan& plan = place.plan;
    const float total = static_cast<float>(plan.rows);
    auto rows = [&](int part) {
        const int64_t left = plan.rows - part * plan.rows_each;
        return static_cast<float>(left < plan.rows_each ? left : plan.rows_each);
    };
    const int lane = threadIdx.x % kWarp;
    for (int group = threadIdx.x / kWarp; group < plan.tile_groups; group += kNormThreads / kWarp) {
        float mean = 0.0f, squares = 0.0f, part_mean, part_m2;
        for (int part = lane; part < parts; part += kWarp) {
            load(group, part, part_mean, part_m2);
            mean = fma(part_mean, rows(part) / total, mean);
        }
        mean = warp_sum(mean);
        for (int part = lane; part < parts; part += kWarp) {
            load(group, part, part_mean, part_m2);
            squares += fma((part_mean - mean) * (part_mean - mean), rows(part) * elements_per_row(place), part_m2);
        }
        squares = warp_sum(squares);
        if (lane == 0) keep(group, mean, rstd_of(place, squares, eps));
    }
}

// The affine maps of the channels of one row's vector.
template <class Place>
DD_DEVICE void load_affines(const Place& place, const NormOptions& o, const NormShared& shared,
                            typename Place::Index row, Affine (&affines)[Place::kLength]) {
    place.per_channel(row, affines, [&](int channel) {
        const int group = place.group(channel);
        return exact_affine(shared.mean[group], shared.rstd[group],
                            channel_options(o, place.shape, place.sample, place.first_channel + channel));
    });
}

// Writes a row's output from its vector as loaded; last: nothing here will read it again.
template <DType dtype, bool last = false, class Place>
DD_DEVICE void finish_row(const Place& place, const NormForward& a, typename Place::Index row,
                          const typename Place::Packed& x, const Affine (&affines)[Place::kLength]) {
    float v[Place::kLength];
    x.floats(v);
#pragma unroll
    for (int k = 0; k < Place::kLength; ++k) v[k] = normalise<dtype>(v[k], affines[k], a.options.silu);
    Place::Packed::of(v).template store<last>(a.y, place.element(row));
}

}  // namespace dd::cuda
