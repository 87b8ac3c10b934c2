// x and dy of a tile in the registers of a block, or of a cluster of blocks: two reads, one write.
#include "group_norm_silu/cuda_backward.cuh"

namespace dd::cuda {
namespace {

constexpr int kMapFloats = 3;  // of an Affine

// The block's shared memory: the maps of its channels and then, in their place, what its threads or rows add
// up to; its share of the sums; the tile's sums.
struct Shared {
    float *entries, *share, *total;  // share, total: [kSums][tile_channels]
    GroupLine* lines;                // [tile_groups]

    DD_HOST_DEVICE static int64_t entry_count(const NormShape& shape, const NormPlan& plan) {
        if (plan.access == Access::contiguous) return kSums * plan.rows_each;
        const int64_t of_threads = shape.vector() * (kNormThreads / plan.columns) * (plan.columns | 1);
        const int64_t of_maps = kMapFloats * plan.tile_channels;
        return of_threads > of_maps ? of_threads : of_maps;
    }

    static int64_t bytes(const NormShape& shape, const NormPlan& plan) {
        return 4 * (entry_count(shape, plan) + 2 * kSums * plan.tile_channels + 2 * plan.tile_groups);
    }

    template <class Place>
    DD_DEVICE explicit Shared(const Place& place) {
        entries = shared_memory();
        share = entries + static_cast<int>(entry_count(place.shape, place.plan));
        total = share + kSums * place.plan.tile_channels;
        lines = reinterpret_cast<GroupLine*>(total + kSums * place.plan.tile_channels);
    }
};

// The maps of a thread's channels where they are last, worked out once for the block; every row has the same.
template <class Place>
DD_DEVICE void share_maps(const Place& place, const NormBackward& a, float* shared, Affine (&maps)[Place::kLength]) {
    const int columns = a.plan.columns, channels = a.plan.tile_channels;
    for (int i = threadIdx.x; i < channels; i += kNormThreads) {
        const Affine map = Channel(place, a, i).map();
        float* at = shared + i % Place::kLength * columns + i / Place::kLength;  // columns in different banks
        at[0] = map.centre;
        at[channels] = map.gain;
        at[2 * channels] = map.offset;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Place::kLength; ++k) {
        const float* at = shared + k * columns + place.column;
        maps[k] = {at[0], at[channels], at[2 * channels]};
    }
}

// The block's share of the channels' sums, where channels are last.
template <DType dtype, int K, class Place, class Tensor>
DD_DEVICE void sum_columns(const Place& place, const NormBackward& a, const Tensor& x, const Tensor& dy,
                           const Affine (&maps)[Place::kLength], const Shared& shared) {
    Sums sums[Place::kLength] = {};
#pragma unroll
    for (int i = 0; i < K; ++i) {
        if (!place.has(x.row(place, i))) continue;
        float v[Place::kLength], g[Place::kLength];
        x.packs[i].floats(v);
        dy.packs[i].floats(g);
#pragma unroll
        for (int k = 0; k < Place::kLength; ++k) add(sums[k], element<dtype>(v[k], g[k], maps[k], a.options.silu));
    }
    reduce_channels(place, sums, shared.entries, shared.share);
}

// The same of a contiguous tile: every row is in one channel, and a channel is a run of rows.
template <DType dtype, int K, class Place, class Tensor>
DD_DEVICE void sum_rows(const Place& place, const NormBackward& a, const Tensor& x, const Tensor& dy,
                        const Shared& shared) {
    const int rows = static_cast<int>(a.plan.rows_each);
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const int row = x.row(place, i);
        if (!place.has(row)) continue;
        Affine maps[Place::kLength];
        load_maps(place, a, row, maps);
        float v[Place::kLength], g[Place::kLength];
        x.packs[i].floats(v);
        dy.packs[i].floats(g);
        Sums sums{};
#pragma unroll
        for (int k = 0; k < Place::kLength; ++k) add(sums, element<dtype>(v[k], g[k], maps[k], a.options.silu));
        shared.entries[row - place.begin] = sums.dz;
        shared.entries[rows + row - place.begin] = sums.dz_d;
        shared.entries[2 * rows + row - place.begin] = sums.d;
    }
    __syncthreads();
    const int rows_per_channel = static_cast<int>(a.shape.pixels) / Place::kLength, lane = threadIdx.x % kWarp;
    for (int i = threadIdx.x / kWarp; i < kSums * a.plan.tile_channels; i += kNormThreads / kWarp) {
        const int channel = i % a.plan.tile_channels, kind = i / a.plan.tile_channels;
        int first = channel * rows_per_channel, last = first + rows_per_channel;
        if (first < place.begin) first = place.begin;
        if (last > place.end) last = place.end;
        float sum = 0.0f;
        for (int row = first + lane; row < last; row += kWarp) {
            sum += shared.entries[kind * rows + row - place.begin];
        }
        sum = warp_sum(sum);
        if (lane == 0) shared.share[i] = sum;
    }
}

// total: the sums of the whole tile.
template <class Place>
DD_DEVICE void share_sums(const Place& place, const Shared& shared) {
    const int blocks = place.plan.cluster;
    if (blocks > 1)
        cluster_sync();
    else
        __syncthreads();
    for (int i = threadIdx.x; i < kSums * place.plan.tile_channels; i += kNormThreads) {
        float shares[kPortableCluster] = {shared.share[i]};
        if (blocks > 1) {
#pragma unroll
            for (int rank = 0; rank < kPortableCluster; ++rank) {  // all are on their way before one is needed
                shares[rank] = load_from_rank(&shared.share[i], rank < blocks ? rank : 0);
            }
        }
        float sum = shares[0];
#pragma unroll
        for (int rank = 1; rank < kPortableCluster; ++rank) {
            if (rank < blocks) sum += shares[rank];
        }
        shared.total[i] = sum;
    }
    if (blocks > 1) cluster_arrive();  // no block may end while another reads its memory
    __syncthreads();
}

template <DType dtype, Access access, int K>
__global__ void __launch_bounds__(kNormThreads, 2) held_backward_kernel(const NormBackward a) {
    const unsigned cluster = static_cast<unsigned>(a.plan.cluster);
    const Place<dtype, access> place(a.shape, a.plan, blockIdx.x / cluster, static_cast<int>(blockIdx.x % cluster));
    const Shared shared(place);
    const Held<Place<dtype, access>, K> x(place, a.x, a.skip, place.first_row()), dy(place, a.dy, place.first_row());
    Affine maps[place.kLength];
    GroupLine lines[place.kLength];
    if constexpr (place.kSameChannels) {
        share_maps(place, a, shared.entries, maps);
        sum_columns<dtype, K>(place, a, x, dy, maps, shared);
    } else {
        sum_rows<dtype, K>(place, a, x, dy, shared);
    }
    share_sums(place, shared);
    const int channels = a.plan.tile_channels;
    auto total = [&](int i) {
        return Sums{shared.total[i], shared.total[channels + i], shared.total[2 * channels + i]};
    };
    group_lines(place, a, total, shared.lines);
    __syncthreads();
    if (blockIdx.x % cluster == 0) small_gradients(place, a, total, shared.lines);
    auto line = [&](int channel) { return shared.lines[place.group(channel)]; };
    // Kept from the loads on, a thread's place would be spilled.
    const Place<dtype, access> out(a.shape, a.plan, again(blockIdx.x) / cluster,
                                   static_cast<int>(blockIdx.x % cluster));
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const auto row = x.row(out, i);
        if (!out.has(row)) continue;
        if (!out.kSameChannels) load_maps(out, a, row, maps);
        out.per_channel(row, lines, line);
        finish_row<dtype>(out, a, row, x.packs[i], dy.packs[i], maps, lines);
    }
    if (cluster > 1) cluster_wait();
}

using Kernel = void (*)(NormBackward);

template <DType dtype, Access access>
Kernel kernel_holding(int held) {
    constexpr int most = most_held(dtype, access, Direction::backward);
    return held == 2 ? &held_backward_kernel<dtype, access, 2> : &held_backward_kernel<dtype, access, most>;
}

Kernel kernel_for(const NormShape& shape, const NormPlan& plan) {
    return for_dtype(shape.dtype, [&](auto dtype) {
        return plan.access == Access::contiguous ? kernel_holding<dtype.value, Access::contiguous>(plan.held)
                                                 : kernel_holding<dtype.value, Access::channels_last>(plan.held);
    });
}

}  // namespace

int held_backward_largest_cluster(const NormShape& shape, const NormPlan& plan) {
    return largest_cluster(reinterpret_cast<const void*>(kernel_for(shape, plan)), kNormThreads);
}

void group_norm_silu_backward_held(const NormBackward& a, cudaStream_t stream) {
    Grid grid{a.plan.tiles * a.plan.cluster, 1, kNormThreads, Shared::bytes(a.shape, a.plan), a.plan.cluster};
    launch("group_norm_silu_backward", kernel_for(a.shape, a.plan), grid, stream, a);
}

}  // namespace dd::cuda
