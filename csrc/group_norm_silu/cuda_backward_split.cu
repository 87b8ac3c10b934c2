// Backward for tiles split over blocks: one pass for the sums over each channel, a second for dx.
#include "group_norm_silu/cuda_backward.cuh"
#include "group_norm_silu/cuda_split.cuh"

namespace dd::cuda {
namespace {

constexpr int kAtOnce = 2;  // vectors of x, and of dy, that a thread loads before it uses one

DD_DEVICE float* part_of(const NormBackward& a, int64_t sample, int64_t channel, int part) {
    return a.sums + kSums * ((sample * a.shape.channels + channel) * a.sum_parts + part);
}

// Adds up the sums of a channel's parts, in their order.
DD_DEVICE Sums load_sums(const NormBackward& a, int64_t sample, int64_t channel) {
    Sums sums{};
#pragma unroll 8  // so many loads are in flight at once
    for (int part = 0; part < a.sum_parts; ++part) {
        const float* p = part_of(a, sample, channel, part);
        sums.dz += p[0];
        sums.dz_d += p[1];
        sums.d += p[2];
    }
    return sums;
}

// Computes, where channels are last, the sums of all of the tile's channels over a block's rows.
template <DType dtype, bool rare>
__global__ void __launch_bounds__(kNormThreads, 2) column_sums_kernel(const NormBackward a) {
    const auto position = split_position<dtype, Access::channels_last>(a);
    float* entries = shared_memory();
    float* channels = entries + position.kLength * position.step * position.pitch;
    Affine maps[position.kLength];
    load_maps(position, a, position.first_row(), maps);
    Sums sums[position.kLength] = {};
    for (auto first = position.first_row(); position.has(first); first += kAtOnce * position.step) {
        const Resident<Position<dtype, Access::channels_last>, kAtOnce> x(position, a.x, a.skip, first),
            dy(position, a.dy, first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (!position.has(x.row(position, i))) continue;
            float v[position.kLength], g[position.kLength];
            x.packs[i].floats(v);
            dy.packs[i].floats(g);
#pragma unroll
            for (int k = 0; k < position.kLength; ++k)
                add(sums[k], element<dtype, rare>(v[k], g[k], maps[k], a.options.activation));
        }
    }
    reduce_channels(position, sums, entries, channels);
    __syncthreads();
    const int part = static_cast<int>(blockIdx.x % a.plan.splits);
    for (int i = threadIdx.x; i < kSums * a.plan.tile_channels; i += kNormThreads) {
        const int channel = i % a.plan.tile_channels, kind = i / a.plan.tile_channels;
        part_of(a, position.sample, position.first_channel + channel, part)[kind] = channels[i];
    }
}

// Computes, in every other layout, the sums of one channel over a part of its pixels.
template <DType dtype, Access access, bool rare>
__global__ void __launch_bounds__(kNormThreads, 4) channel_sums_kernel(const NormBackward a) {
    using Packed = Pack<dtype, access == Access::scalar>;
    constexpr int length = Packed::kLength;
    const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.sum_parts));
    const int64_t first_channel = a.first_tile * a.plan.tile_channels;  // counted over all samples
    const int64_t index = first_channel + blockIdx.x / static_cast<unsigned>(a.sum_parts);
    const int64_t sample = index / a.shape.channels, channel = index % a.shape.channels;
    const int64_t group = sample * a.shape.groups + channel / a.plan.group_channels;
    const Affine map = exact_affine(a.mean[group], a.rstd[group], channel_options(a.options, a.shape, sample, channel));

    const int64_t vectors = a.shape.pixels / length, each = (vectors + a.sum_parts - 1) / a.sum_parts;
    const int64_t end = vectors - part * each < each ? vectors : (part + 1) * each;
    const bool last = a.shape.channels_last;
    const int64_t outer = last ? sample * a.shape.pixels : sample, inner = last ? 1 : a.shape.pixels;
    const ConcatElement position(a.shape, channel >= a.shape.x_channels, outer, channel, inner);
    const void* x = position.of(a.x, a.skip);
    const int64_t start = (outer * a.shape.channels + channel) * inner;
    Sums sums{};
    for (int64_t i = part * each + threadIdx.x; i < end; i += kNormThreads) {
        float v[length], g[length];
        Packed::load(x, position.element + i * (last ? position.channels : length)).floats(v);
        Packed::load(a.dy, start + i * (last ? a.shape.channels : length)).floats(g);
#pragma unroll
        for (int k = 0; k < length; ++k) add(sums, element<dtype, rare>(v[k], g[k], map, a.options.activation));
    }
    sums = {warp_sum(sums.dz), warp_sum(sums.dz_d), warp_sum(sums.d)};
    float* warps = shared_memory();
    if (threadIdx.x % kWarp == 0) {
        float* mine = warps + kSums * (threadIdx.x / kWarp);
        mine[0] = sums.dz;
        mine[1] = sums.dz_d;
        mine[2] = sums.d;
    }
    __syncthreads();
    if (threadIdx.x < kSums) {
        float sum = 0.0f;
        for (int warp = 0; warp < kNormThreads / kWarp; ++warp) sum += warps[kSums * warp + threadIdx.x];
        part_of(a, sample, channel, part)[threadIdx.x] = sum;
    }
}

template <DType dtype, Access access, bool rare>
__global__ void __launch_bounds__(kNormThreads, 2) apply_backward_kernel(const NormBackward a) {
    const auto position = split_position<dtype, access>(a);
    GradientMap* shared_gradients = reinterpret_cast<GradientMap*>(shared_memory());
    auto total = [&](int channel) { return load_sums(a, position.sample, position.first_channel + channel); };
    compute_gradient_maps(position, a, total, shared_gradients);
    __syncthreads();
    if (blockIdx.x % a.plan.splits == 0) small_gradients(position, a, total, shared_gradients);
    auto gradient = [&](int channel) { return shared_gradients[position.group(channel)]; };
    Affine maps[position.kLength];
    GradientMap gradients[position.kLength];
    if (position.kSameChannels && position.active) {
        load_maps(position, a, position.first_row(), maps);
        position.per_channel(position.first_row(), gradients, gradient);
    }
    for (auto first = position.first_row(); position.has(first); first += kAtOnce * position.step) {
        const Resident<Position<dtype, access>, kAtOnce, true> x(position, a.x, a.skip, first),
            dy(position, a.dy, first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const auto row = x.row(position, i);
            if (!position.has(row)) continue;
            if (!position.kSameChannels) {
                load_maps(position, a, row, maps);
                position.per_channel(row, gradients, gradient);
            }
            finish_row<dtype, rare, true>(position, a, row, x.packs[i], dy.packs[i], maps, gradients);
        }
    }
}

template <DType dtype, Access access, bool rare>
void run_sums(const NormBackward& a, int64_t tiles, cudaStream_t stream) {
    constexpr const char* name = "group_norm_silu_backward";
    if constexpr (access == Access::channels_last) {
        const int64_t entries = a.shape.vector() * (kNormThreads / a.plan.columns) * (a.plan.columns | 1);
        const int64_t bytes = 4 * (entries + kSums * a.plan.tile_channels);
        launch(name, column_sums_kernel<dtype, rare>, {tiles * a.plan.splits, 1, kNormThreads, bytes}, stream, a);
    } else {
        const int64_t blocks = tiles * a.plan.tile_channels * a.sum_parts, bytes = 4 * kSums * (kNormThreads / kWarp);
        launch(name, channel_sums_kernel<dtype, access, rare>, {blocks, 1, kNormThreads, bytes}, stream, a);
    }
}

}  // namespace

void group_norm_silu_backward_split(const NormBackward& arguments, cudaStream_t stream) {
    const int64_t wave = std::max<int64_t>(1, arguments.plan.wave_tiles / 2);  // x and dy
    for_waves(arguments, wave, [&](const auto& a, int64_t tiles, auto dtype, auto access) {
        const int64_t bytes = static_cast<int64_t>(sizeof(GradientMap)) * a.plan.tile_groups;
        for_activation(a.options.activation, [&](auto rare) {
            run_sums<dtype.value, access.value, rare.value>(a, tiles, stream);
            launch("group_norm_silu_backward", apply_backward_kernel<dtype.value, access.value, rare.value>,
                   {tiles * a.plan.splits, 1, kNormThreads, bytes}, stream, a);
        });
    });
}

}  // namespace dd::cuda
