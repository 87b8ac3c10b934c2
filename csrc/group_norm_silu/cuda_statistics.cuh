// Statistics over a tile's groups: of the vectors in a thread's registers, of a block, and of all blocks of the tile.
#pragma once

#include "group_norm_silu/cuda_position.cuh"

namespace dd::cuda {

// Moments of the elements that a thread has read, separately for each position in its vectors: count, mean, and the sum
// of squared deviations from it.
template <int length>
struct Moments {
    float count = 0.0f;
    float mean[length] = {}, m2[length] = {};

    // Makes these the moments of both (Chan, Golub and LeVeque, 1979); the other's count is not 0.
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

    // Puts the moments of the whole vector, whose positions have equal counts, into position 0.
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

// K rows' vectors in a thread's registers, from first_row on, and their moments with pre_shift added.
// last: no later access reads them, so that they need not stay in the caches.
template <class Position, int K, bool last = false>
struct Resident {
    using Packed = typename Position::Packed;
    using Index = typename Position::Index;
    static constexpr int kLength = Position::kLength;

    Packed packs[K];
    Index first;

    DD_DEVICE Resident(const Position& position, const void* data, Index first_row) : first(first_row) {
        load(position, [&](Index row) { return Packed::template load<last>(data, position.element(row)); });
    }

    // Loads from the virtual concatenation [x, skip]; skip may be null.
    DD_DEVICE Resident(const Position& position, const void* x, const void* skip, Index first_row) : first(first_row) {
        load(position, [&](Index row) {
            const ConcatElement part = position.concat_element(row);
            return Packed::template load<last>(part.of(x, skip), part.element);
        });
    }

    DD_DEVICE Index row(const Position& position, int i) const { return first + i * position.step; }

    // Adds the residual to x's part of the tile and stores the sum.
    DD_DEVICE void add(const Position& position, const void* residual, void* sum) {
        visit_x(position,
                [&](int i, int64_t element) { packs[i] = packs[i] + Packed::template load<true>(residual, element); });
        visit_x(position, [&](int i, int64_t element) { packs[i].store(sum, element); });
    }

    // Computes the moments at each position in the vector: first the mean, then the deviations from it.
    DD_DEVICE Moments<kLength> moments(const Position& position, const float* pre_shift) const {
        Moments<kLength> m;
        const Index left = position.has(first) ? (position.end - first - 1) / position.step + 1 : 0;
        m.count = static_cast<float>(left < K ? left : K);
        if (m.count == 0.0f) return m;
        each(position, pre_shift, [&](int k, float v) { m.mean[k] += v; });
        const float scale = 1.0f / m.count;
#pragma unroll
        for (int k = 0; k < kLength; ++k) m.mean[k] *= scale;
        each(position, pre_shift, [&](int k, float v) { m.m2[k] = fma(v - m.mean[k], v - m.mean[k], m.m2[k]); });
        return m;
    }

private:
    template <class Load>
    DD_DEVICE void load(const Position& position, const Load& load_row) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (position.has(row(position, i))) packs[i] = load_row(row(position, i));
        }
    }

    // Calls visit(i, element) for every vector that is x's.
    template <class Visit>
    DD_DEVICE void visit_x(const Position& position, const Visit& visit) const {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (!position.has(row(position, i))) continue;
            const ConcatElement part = position.concat_element(row(position, i));
            if (!part.in_skip) visit(i, part.element);
        }
    }

    template <class Visit>
    DD_DEVICE void each(const Position& position, const float* pre_shift, const Visit& visit) const {
        const int64_t first_channel = position.sample * position.shape.channels + position.first_channel;
        auto shift_of = [&](int channel) { return pre_shift[first_channel + channel]; };
        float shift[kLength] = {};
        if (pre_shift && position.kSameChannels) position.per_channel(first, shift, shift_of);
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (!position.has(row(position, i))) continue;
            float v[kLength];
            packs[i].floats(v);
            if (pre_shift && !position.kSameChannels) position.per_channel(row(position, i), shift, shift_of);
#pragma unroll
            for (int k = 0; k < kLength; ++k) visit(k, v[k] + shift[k]);
        }
    }
};

// Shared memory of a block: an entry per thread (or per thread and position in its vector), then its groups.
struct NormShared {
    float *entry_mean, *entry_m2;  // [planes][step][pitch]
    float *group_mean, *group_m2;  // [groups], of this block's partition
    float *mean, *rstd;            // [groups], of the tile

    static int64_t bytes(const NormShape& shape, const NormPlan& plan) {
        bool whole = plan.access != Access::channels_last || plan.group_channels % shape.vector() == 0;
        int64_t entries = (whole ? 1 : shape.vector()) * (kNormThreads / plan.columns) * (plan.columns | 1);
        return 4 * (2 * entries + 4 * plan.tile_groups);
    }

    template <class Position>
    DD_DEVICE explicit NormShared(const Position& position) {
        const int entries = (position.whole ? 1 : Position::kLength) * position.step * position.pitch;
        const int groups = position.plan.tile_groups;
        entry_mean = shared_memory();
        entry_m2 = entry_mean + entries;
        group_mean = entry_m2 + entries;
        group_m2 = group_mean + groups;
        mean = group_m2 + groups;
        rstd = mean + groups;
    }
};

template <class Position>
DD_DEVICE void store_entries(const Position& position, Moments<Position::kLength> m, const NormShared& shared) {
    if (position.whole) m.join();
    if (!position.active) return;
    const int at = position.first_row_in_block() * position.pitch + position.column;
#pragma unroll
    for (int k = 0; k < Position::kLength; ++k) {
        if (k > 0 && position.whole) break;
        shared.entry_mean[k * position.step * position.pitch + at] = m.mean[k];
        shared.entry_m2[k * position.step * position.pitch + at] = m.m2[k];
    }
}

// Calls leave(group, mean, m2) with the moments of each group over the block's partition: a warp sums those of the
// threads, always in the same order.
template <class Position, class Leave>
DD_DEVICE void reduce_block(const Position& position, const Moments<Position::kLength>& m, const NormShared& shared,
                            const Leave& leave) {
    store_entries(position, m, shared);
    __syncthreads();
    // Members: the vectors, or the elements of vectors, that make up a group's channels.
    const int per_vector = position.whole ? 1 : Position::kLength, elements = Position::kLength / per_vector;
    const int members = position.kSameChannels ? position.plan.group_channels / elements : 1;
    const int lane = threadIdx.x % kWarp, entries = members * position.step;
    const float rows = static_cast<float>(position.end - position.begin);
    for (int group = threadIdx.x / kWarp; group < position.plan.tile_groups; group += kNormThreads / kWarp) {
        auto entry = [&](int i) {
            const int member = group * members + i / position.step;
            return (member % per_vector * position.step + i % position.step) * position.pitch + member / per_vector;
        };
        float sum = 0.0f, squares = 0.0f;
        for (int i = lane; i < entries; i += kWarp) {
            sum = fma(shared.entry_mean[entry(i)], static_cast<float>(position.rows_of(i % position.step)), sum);
        }
        const float mean = warp_sum(sum) / (rows * static_cast<float>(members));
        for (int i = lane; i < entries; i += kWarp) {
            const float delta = shared.entry_mean[entry(i)] - mean;
            const float count = static_cast<float>(position.rows_of(i % position.step) * elements);
            squares += fma(delta * count, delta, shared.entry_m2[entry(i)]);
        }
        squares = warp_sum(squares);
        if (lane == 0) leave(group, mean, squares);
    }
}

// The number of elements that a row of a tile has in each of its groups.
template <class Position>
DD_DEVICE float elements_per_row(const Position& position) {
    return static_cast<float>(position.kSameChannels ? position.plan.group_channels : position.kLength);
}

template <class Position>
DD_DEVICE float rstd_of(const Position& position, float m2, float eps) {
    return reciprocal_sqrt(m2 / (static_cast<float>(position.plan.rows) * elements_per_row(position)) + eps);
}

// Calls keep(group, mean, rstd) for each of a tile's groups, from the moments of `parts` blocks, the last of which may
// have fewer rows. load(group, part, mean, m2) reads those of one block. A warp has a group, and a lane a block, so
// that all loads are under way at once.
template <class Position, class Load, class Keep>
DD_DEVICE void combine_parts(const Position& position, int parts, float eps, const Load& load, const Keep& keep) {
    const NormPlan& plan = position.plan;
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
            squares += fma((part_mean - mean) * (part_mean - mean), rows(part) * elements_per_row(position), part_m2);
        }
        squares = warp_sum(squares);
        if (lane == 0) keep(group, mean, rstd_of(position, squares, eps));
    }
}

// The affine maps of the channels of one row's vector.
template <class Position>
DD_DEVICE void load_affines(const Position& position, const Options& o, const NormShared& shared,
                            typename Position::Index row, Affine (&affines)[Position::kLength]) {
    position.per_channel(row, affines, [&](int channel) {
        const int group = position.group(channel);
        return exact_affine(shared.mean[group], shared.rstd[group],
                            channel_options(o, position.shape, position.sample, position.first_channel + channel));
    });
}

// Writes a row's output from its vector as loaded; last: as Pack::store.
template <DType dtype, bool rare, bool last = false, class Position>
DD_DEVICE void finish_row(const Position& position, const NormForward& a, typename Position::Index row,
                          const typename Position::Packed& x, const Affine (&affines)[Position::kLength]) {
    float v[Position::kLength];
    x.floats(v);
#pragma unroll
    for (int k = 0; k < Position::kLength; ++k) {
        const float z = fma(v[k] - affines[k].centre, affines[k].gain, affines[k].offset);
        v[k] = activate<dtype, rare>(z, a.options.activation);
    }
    Position::Packed::of(v).template store<last>(a.y, position.element(row));
}

}  // namespace dd::cuda
