// The parts of the backward kernels. With dz the gradient before the activation and d = x - centre (see formula.h),
// every gradient follows from the sums of dz, dz d and d over a channel of a sample.
#pragma once

#include "group_norm_silu/cuda_backward.h"
#include "group_norm_silu/cuda_statistics.cuh"

namespace dd::cuda {

constexpr int kSums = 3;

struct Sums {
    float dz, dz_d, d;
};

// d = x - centre and dz, of one element.
struct Element {
    float d, dz;
};

template <DType dtype, bool rare>
DD_DEVICE Element element(float x, float dy, const Affine& map, int activation) {
    const float d = x - map.centre;
    return {d, activation_slope<dtype, rare>(dy, fma(d, map.gain, map.offset), activation)};
}

DD_DEVICE void add(Sums& sums, const Element& e) {
    sums.dz += e.dz;
    sums.dz_d = fma(e.dz, e.d, sums.dz_d);
    sums.d += e.d;
}

// The statistics and parameters of one channel of a tile.
struct Channel {
    float mean, rstd;
    ChannelOptions<float> options;

    template <class Position>
    DD_DEVICE Channel(const Position& position, const NormBackward& a, int channel) {
        const int64_t group = position.group_in_tensor(position.group(channel));
        mean = a.mean[group];
        rstd = a.rstd[group];
        options = channel_options(a.options, a.shape, position.sample, position.first_channel + channel);
    }

    DD_DEVICE Affine map() const { return exact_affine(mean, rstd, options); }
    DD_DEVICE float dn_from_dz() const { return options.weight * (1.0f + options.scale); }
};

template <class Position>
DD_DEVICE void load_maps(const Position& position, const NormBackward& a, typename Position::Index row,
                         Affine (&maps)[Position::kLength]) {
    position.per_channel(row, maps, [&](int channel) { return Channel(position, a, channel).map(); });
}

// Computes the GradientMap of every group of a tile, a warp each. load(channel) gives the Sums of a channel.
template <class Position, class Load>
DD_DEVICE void compute_gradient_maps(const Position& position, const NormBackward& a, const Load& load,
                                     GradientMap* gradients) {
    const int channels = a.plan.group_channels, lane = threadIdx.x % kWarp;
    const float count = static_cast<float>(channels) * static_cast<float>(a.shape.pixels);
    for (int group = threadIdx.x / kWarp; group < a.plan.tile_groups; group += kNormThreads / kWarp) {
        float dn = 0.0f, dn_n = 0.0f, rstd = 0.0f;
        for (int i = lane; i < channels; i += kWarp) {
            const Channel channel(position, a, group * channels + i);
            const Sums sums = load(group * channels + i);
            rstd = channel.rstd;
            dn = fma(sums.dz, channel.dn_from_dz(), dn);
            dn_n = fma(sums.dz_d * rstd, channel.dn_from_dz(), dn_n);
        }
        dn = warp_sum(dn) / count;
        dn_n = warp_sum(dn_n) / count;
        if (lane == 0) gradients[group] = gradient_map(dn, dn_n, rstd, 0.0f);  // in float, the centre is exact
    }
}

// Writes the gradients of the options of a tile's channels.
template <class Position, class Load>
DD_DEVICE void small_gradients(const Position& position, const NormBackward& a, const Load& load,
                               const GradientMap* gradients) {
    for (int i = threadIdx.x; i < a.plan.tile_channels; i += kNormThreads) {
        const Channel channel(position, a, i);
        const Sums sums = load(i);
        const GradientMap gradient = gradients[position.group(i)];
        const ChannelOptions<float>& o = channel.options;
        const float dz_n = sums.dz_d * channel.rstd;
        const int64_t at = position.sample * a.shape.channels + position.first_channel + i;
        if (a.dshift) a.dshift[at] = sums.dz;
        if (a.dscale) a.dscale[at] = fma(dz_n, o.weight, sums.dz * o.bias);
        if (a.dpre_shift) {
            const float level = static_cast<float>(a.shape.pixels) * gradient.level;
            a.dpre_shift[at] = fma(sums.dz, channel.map().gain, fma(sums.d, gradient.slope, level));
        }
        if (a.per_sample) {
            a.per_sample[at] = dz_n * (1.0f + o.scale);
            a.per_sample[a.shape.samples * a.shape.channels + at] = sums.dz * (1.0f + o.scale);
        }
    }
}

// Writes dx of one row; last: as Pack::store.
template <DType dtype, bool rare, bool last = false, class Position>
DD_DEVICE void finish_row(const Position& position, const NormBackward& a, typename Position::Index row,
                          const typename Position::Packed& x, const typename Position::Packed& dy,
                          const Affine (&maps)[Position::kLength], const GradientMap (&gradients)[Position::kLength]) {
    float v[Position::kLength], g[Position::kLength];
    x.floats(v);
    dy.floats(g);
#pragma unroll
    for (int k = 0; k < Position::kLength; ++k) {
        const Element e = element<dtype, rare>(v[k], g[k], maps[k], a.options.activation);
        v[k] = fma(e.dz, maps[k].gain, fma(e.d, gradients[k].slope, gradients[k].level));
    }
    const ConcatElement part = position.concat_element(row);
    if (a.dsum && !part.in_skip) {
        Position::Packed::template load<true>(a.dsum, part.element).floats(g);
#pragma unroll
        for (int k = 0; k < Position::kLength; ++k) v[k] += g[k];
    }
    Position::Packed::of(v).template store<last>(part.of(a.dx, a.dskip), part.element);
}

// Adds up sums[k] of a block's threads where channels are last, into the sums of the tile's channels,
// `channels` [kSums][tile_channels]; the kinds of sums use `entries` one after another.
template <class Position>
DD_DEVICE void reduce_channels(const Position& position, const Sums (&sums)[Position::kLength], float* entries,
                               float* channels) {
    const int at = position.first_row_in_block() * position.pitch + position.column,
              plane = position.step * position.pitch;
#pragma unroll
    for (int kind = 0; kind < kSums; ++kind) {
        __syncthreads();
        if (position.active) {
#pragma unroll
            for (int k = 0; k < Position::kLength; ++k) {
                entries[k * plane + at] = kind == 0 ? sums[k].dz : kind == 1 ? sums[k].dz_d : sums[k].d;
            }
        }
        __syncthreads();
        // Consecutive threads take consecutive columns, which lie in different banks.
        for (int i = threadIdx.x; i < position.plan.tile_channels; i += kNormThreads) {
            const int column = i % position.plan.columns, k = i / position.plan.columns;
            float sum = 0.0f;
            for (int row = 0; row < position.step; ++row) sum += entries[k * plane + row * position.pitch + column];
            channels[kind * position.plan.tile_channels + column * Position::kLength + k] = sum;
        }
    }
}

}  // namespace dd::cuda
