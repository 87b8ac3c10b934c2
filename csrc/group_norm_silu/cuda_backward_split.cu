// A tile split over blocks: one pass for the sums over its channels, a second for dx.
#include "group_norm_silu/cuda_backward.cuh"
#include "group_norm_silu/cuda_split.cuh"

namespace dd::cuda {
namespace {

constexpr int kAtOnce = 2;  // vectors of x, and of dy, that a thread has under way

DD_DEVICE float* part_of(const NormBackward& a, int64_t sample, int64_t channel, int part) {
    return a.sums + kSums * ((sample * a.shape.channels + channel) * a.sum_parts + part);
}

// The sums of a whole channel, over its parts in their order.
DD_DEVICE Sums load_sums(const NormBackward& a, int64_t sample, int64_t channel) {
    Sums sums{};
#pragma unroll 8  // so many are on their way at once
    for (int part = 0; part < a.sum_parts; ++part) {
        const float* p = part_of(a, sample, channel, part);
        sums.dz += p[0];
        sums.dz_d += p[1];
        sums.d += p[2];
    }
    return sums;
}

// Channels last: a block has a share of the rows of all the tile's channels.
template <DType dtype>
__global__ void __launch_bounds__(kNormThreads, 2) column_sums_kernel(const NormBackward a) {
    const auto place = split_place<dtype, Access::channels_last>(a);
    float* entries = shared_memory();
    float* channels = entries + place.kLength * place.step * place.pitch;
    Affine maps[place.kLength];
    load_maps(place, a, place.first_row(), maps);
    Sums sums[place.kLength] = {};
    for (auto first = place.first_row(); place.has(first); first += kAtOnce * place.step) {
        const Held<Place<dtype, Access::channels_last>, kAtOnce> x(place, a.x, a.skip, first), dy(place, a.dy, first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (!place.has(x.row(place, i))) continue;
            float v[place.kLength], g[place.kLength];
            x.packs[i].floats(v);
            dy.packs[i].floats(g);
#pragma unroll
            for (int k = 0; k < place.kLength; ++k) add(sums[k], element<dtype>(v[k], g[k], maps[k], a.options.silu));
        }
    }
    reduce_channels(place, sums, entries, channels);
    __syncthreads();
    const int part = static_cast<int>(blockIdx.x % a.plan.splits);
    for (int i = threadIdx.x; i < kSums * a.plan.tile_channels; i += kNormThreads) {
        const int channel = i % a.plan.tile_channels, kind = i / a.plan.tile_channels;
        part_of(a, place.sample, place.first_channel + channel, part)[kind] = channels[i];
    }
}

// Every other layout: a block has a share of the pixels of one channel.
template <DType dtype, Access access>
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
    const Part place(a.shape, channel >= a.shape.x_channels, outer, channel, inner);
    const void* x = place.of(a.x, a.skip);
    const int64_t start = (outer * a.shape.channels + channel) * inner;
    Sums sums{};
    for (int64_t i = part * each + threadIdx.x; i < end; i += kNormThreads) {
        float v[length], g[length];
        Packed::load(x, place.element + i * (last ? place.channels : length)).floats(v);
        Packed::load(a.dy, start + i * (last ? a.shape.channels : length)).floats(g);
#pragma unroll
        for (int k = 0; k < length; ++k) add(sums, element<dtype>(v[k], g[k], map, a.options.silu));
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

template <DType dtype, Access access>
__global__ void __launch_bounds__(kNormThreads, 2) apply_backward_kernel(const NormBackward a) {
    const auto place = split_place<dtype, access>(a);
    GroupLine* shared_lines = reinterpret_cast<GroupLine*>(shared_memory());
    auto total = [&](int channel) { return load_sums(a, place.sample, place.first_channel + channel); };
    group_lines(place, a, total, shared_lines);
    __syncthreads();
    if (blockIdx.x % a.plan.splits == 0) small_gradients(place, a, total, shared_lines);
    auto line = [&](int channel) { return shared_lines[place.group(channel)]; };
    Affine maps[place.kLength];
    GroupLine lines[place.kLength];
    if (place.kSameChannels && place.active) {
        load_maps(place, a, place.first_row(), maps);
        place.per_channel(place.first_row(), lines, line);
    }
    for (auto first = place.first_row(); place.has(first); first += kAtOnce * place.step) {
        const Held<Place<dtype, access>, kAtOnce, true> x(place, a.x, a.skip, first), dy(place, a.dy, first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const auto row = x.row(place, i);
            if (!place.has(row)) continue;
            if (!place.kSameChannels) {
                load_maps(place, a, row, maps);
                place.per_channel(row, lines, line);
            }
            finish_row<dtype, true>(place, a, row, x.packs[i], dy.packs[i], maps, lines);
        }
    }
}

template <DType dtype, Access access>
void run_sums(const NormBackward& a, int64_t tiles, cudaStream_t stream) {
    constexpr const char* name = "group_norm_silu_backward";
    if constexpr (access == Access::channels_last) {
        const int64_t entries = a.shape.vector() * (kNormThreads / a.plan.columns) * (a.plan.columns | 1);
        const int64_t bytes = 4 * (entries + kSums * a.plan.tile_channels);
        launch(name, column_sums_kernel<dtype>, {tiles * a.plan.splits, 1, kNormThreads, bytes}, stream, a);
    } else {
        const int64_t blocks = tiles * a.plan.tile_channels * a.sum_parts, bytes = 4 * kSums * (kNormThreads / kWarp);
        launch(name, channel_sums_kernel<dtype, access>, {blocks, 1, kNormThreads, bytes}, stream, a);
    }
}

}  // namespace

void group_norm_silu_backward_split(const NormBackward& arguments, cudaStream_t stream) {
    const int64_t wave = std::max<int64_t>(1, arguments.plan.wave_tiles / 2);  // x and dy
    for_waves(arguments, wave, [&](const auto& a, int64_t tiles, auto dtype, auto access) {
        run_sums<dtype.value, access.value>(a, tiles, stream);
        const int64_t bytes = static_cast<int64_t>(sizeof(GroupLine)) * a.plan.tile_groups;
        launch("group_norm_silu_backward", apply_backward_kernel<dtype.value, access.value>,
               {tiles * a.plan.splits, 1, kNormThreads, bytes}, stream, a);
    });
}

}  // namespace dd::cuda
