// What the backward kernels share. With dz the gradient before the activation and d = x - centre (see
// formula.h), every gradient follows from the sums of dz, dz d and d over a channel of a sample.
#pragma once

#include "group_norm_silu/cuda_backward.h"
#include "group_norm_silu/cuda_tile.cuh"

namespace dd::cuda {

constexpr int kSums = 3;

struct Sums {
    float dz, dz_d, d;
};

template <DType dtype>
DD_DEVICE float activation_slope(float dy, float z, bool silu) {
    if (!silu) return dy;
    if constexpr (dtype == DType::float32) return activation_gradient<true>(dy, z);
    return activation_gradient<true>(Approximate{dy}, Approximate{z}).v;
}

// d = x - centre and dz, of one element.
struct Element {
    float d, dz;
};

template <DType dtype>
DD_DEVICE Element element(float x, float dy, const Affine& map, bool silu) {
    const float d = x - map.centre;
    return {d, activation_slope<dtype>(dy, fma(d, map.gain, map.offset), silu)};
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

    template <class Place>
    DD_DEVICE Channel(const Place& place, const NormBackward& a, int channel) {
        const int64_t group = place.group_in_tensor(place.group(channel));
        mean = a.mean[group];
        rstd = a.rstd[group];
        options = channel_options(a.options, a.shape, place.sample, place.first_channel + channel);
    }

    DD_DEVICE Affine map() const { return exact_affine(mean, rstd, options); }
    DD_DEVICE float dn_from_dz() const { return options.weight * (1.0f + options.scale); }
};

template <class Place>
DD_DEVICE void load_maps(const Place& place, const NormBackward& a, typename Place::Index row,
                         Affine (&maps)[Place::kLength]) {
    place.per_channel(row, maps, [&](int channel) { return Channel(place, a, channel).map(); });
}

// The gradient's line of every group of a tile, by a warp each. load(channel) gives the Sums of a channel.
template <class Place, class Load>
DD_DEVICE void group_lines(const Place& place, const NormBackward& a, const Load& load, GroupLine* lines) {
    const int channels = a.plan.group_channels, lane = threadIdx.x % kWarp;
    const float count = static_cast<float>(channels) * static_cast<float>(a.shape.pixels);
    for (int group = threadIdx.x / kWarp; group < a.plan.tile_groups; group += kNormThreads / kWarp) {
        float dn = 0.0f, dn_n = 0.0f, rstd = 0.0f;
        for (int i = lane; i < channels; i += kWarp) {
            const Channel channel(place, a, group * channels + i);
            const Sums sums = load(group * channels + i);
            rstd = channel.rstd;
            dn = fma(sums.dz, channel.dn_from_dz(), dn);
            dn_n = fma(sums.dz_d * rstd, channel.dn_from_dz(), dn_n);
        }
        dn = warp_sum(dn) / count;
        dn_n = warp_sum(dn_n) / count;
        if (lane == 0) lines[group] = group_line(dn, dn_n, rstd, 0.0f);  // in float, the centre is exact
    }
}

// Every gradient of a tile that is not dx.
template <class Place, class Load>
DD_DEVICE void small_gradients(const Place& place, const NormBackward& a, const Load& load, const GroupLine* lines) {
    for (int i = threadIdx.x; i < a.plan.tile_channels; i += kNormThreads) {
        const Channel channel(place, a, i);
        const Sums sums = load(i);
        const GroupLine line = lines[place.group(i)];
        const ChannelOptions<float>& o = channel.options;
        const float dz_n = sums.dz_d * channel.rstd;
        const int64_t at = place.sample * a.shape.channels + place.first_channel + i;
        if (a.dshift) a.dshift[at] = sums.dz;
        if (a.dscale) a.dscale[at] = fma(dz_n, o.weight, sums.dz * o.bias);
        if (a.dpre_shift) {
            const float level = static_cast<float>(a.shape.pixels) * line.level;
            a.dpre_shift[at] = fma(sums.dz, channel.map().gain, fma(sums.d, line.slope, level));
        }
        if (a.per_sample) {
            a.per_sample[at] = dz_n * (1.0f + o.scale);
            a.per_sample[a.shape.samples * a.shape.channels + at] = sums.dz * (1.0f + o.scale);
        }
    }
}

// Writes dx of one row; last: nothing here will read it again.
template <DType dtype, bool last = false, class Place>
DD_DEVICE void finish_row(const Place& place, const NormBackward& a, typename Place::Index row,
                          const typename Place::Packed& x, const typename Place::Packed& dy,
                          const Affine (&maps)[Place::kLength], const GroupLine (&lines)[Place::kLength]) {
    float v[Place::kLength], g[Place::kLength];
    x.floats(v);
    dy.floats(g);
#pragma unroll
    for (int k = 0; k < Place::kLength; ++k) {
        const Element e = element<dtype>(v[k], g[k], maps[k], a.options.silu);
        v[k] = fma(e.dz, maps[k].gain, fma(e.d, lines[k].slope, lines[k].level));
    }
    const Part part = place.part(row);
    if (a.dsum && !part.in_skip) {
        Place::Packed::template load<true>(a.dsum, part.element).floats(g);
#pragma unroll
        for (int k = 0; k < Place::kLength; ++k) v[k] += g[k];
    }
    Place::Packed::of(v).template store<last>(part.of(a.dx, a.dskip), part.element);
}

// Sums over a block's rows where channels are last: sums[k] of every thread to those of the tile's
// channels, in `channels` [kSums][tile_channels]; one kind after another through `entries`.
template <class Place>
DD_DEVICE void reduce_channels(const Place& place, const Sums (&sums)[Place::kLength], float* entries,
                               float* channels) {
    const int at = place.first_row_in_block() * place.pitch + place.column, plane = place.step * place.pitch;
#pragma unroll
    for (int kind = 0; kind < kSums; ++kind) {
        __syncthreads();
        if (place.active) {
#pragma unroll
            for (int k = 0; k < Place::kLength; ++k) {
                entries[k * plane + at] = kind == 0 ? sums[k].dz : kind == 1 ? sums[k].dz_d : sums[k].d;
            }
        }
        __syncthreads();
        // Consecutive threads take consecutive columns, which lie in different banks.
        for (int i = threadIdx.x; i < place.plan.tile_channels; i += kNormThreads) {
            const int column = i % place.plan.columns, k = i / place.plan.columns;
            float sum = 0.0f;
            for (int row = 0; row < place.step; ++row) sum += entries[k * plane + row * place.pitch + column];
            channels[kind * place.plan.tile_channels + column * Place::kLength + k] = sum;
        }
    }
}

}  // namespace dd::cuda
