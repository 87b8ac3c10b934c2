// Backward, register-resident: x and dy of a tile in the registers of a block, or of a cluster of blocks. Two reads,
// one write.
#include "group_norm_silu/cuda_backward.cuh"
#include "group_norm_silu/cuda_resident.cuh"

namespace dd::cuda {
namespace {

constexpr int kMapFloats = 3;  // of an Affine

// The block's shared memory: the maps of its channels and then, in the same place, the sums of its threads or rows; the
// block's sums; the tile's sums.
struct Shared {
    float *entries, *partial, *total;  // partial, total: [kSums][tile_channels]
    GradientMap* gradients;            // [tile_groups]

    DD_HOST_DEVICE static int64_t entry_count(const NormShape& shape, const NormPlan& plan) {
        if (plan.access == Access::contiguous) return kSums * plan.rows_each;
        const int64_t of_threads = shape.vector() * (kNormThreads / plan.columns) * (plan.columns | 1);
        const int64_t of_maps = kMapFloats * plan.tile_channels;
        return of_threads > of_maps ? of_threads : of_maps;
    }

    static int64_t bytes(const NormShape& shape, const NormPlan& plan) {
        return 4 * (entry_count(shape, plan) + 2 * kSums * plan.tile_channels + 2 * plan.tile_groups);
    }

    template <class Position>
    DD_DEVICE explicit Shared(const Position& position) {
        entries = shared_memory();
        partial = entries + static_cast<int>(entry_count(position.shape, position.plan));
        total = partial + kSums * position.plan.tile_channels;
        gradients = reinterpret_cast<GradientMap*>(total + kSums * position.plan.tile_channels);
    }
};

// Loads the maps of a thread's channels where they are last: computed once per block, and the same for every row.
template <class Position>
DD_DEVICE void share_affines(const Position& position, const NormBackward& a, float* shared,
                             Affine (&maps)[Position::kLength]) {
    const int columns = a.plan.columns, channels = a.plan.tile_channels;
    for (int i = threadIdx.x; i < channels; i += kNormThreads) {
        const Affine map = Channel(position, a, i).map();
        float* at = shared + i % Position::kLength * columns + i / Position::kLength;  // columns in different banks
        at[0] = map.centre;
        at[channels] = map.gain;
        at[2 * channels] = map.offset;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Position::kLength; ++k) {
        const float* at = shared + k * columns + position.column;
        maps[k] = {at[0], at[channels], at[2 * channels]};
    }
}

// Computes the block's sums of each channel where channels are last.
template <DType dtype, bool rare, int K, class Position, class Tensor>
DD_DEVICE void sum_columns(const Position& position, const NormBackward& a, const Tensor& x, const Tensor& dy,
                           const Affine (&maps)[Position::kLength], const Shared& shared) {
    Sums sums[Position::kLength] = {};
#pragma unroll
    for (int i = 0; i < K; ++i) {
        if (!position.has(x.row(position, i))) continue;
        float v[Position::kLength], g[Position::kLength];
        x.packs[i].floats(v);
        dy.packs[i].floats(g);
#pragma unroll
        for (int k = 0; k < Position::kLength; ++k)
            add(sums[k], element<dtype, rare>(v[k], g[k], maps[k], a.options.activation));
    }
    reduce_channels(position, sums, shared.entries, shared.partial);
}

// Computes the block's sums of each channel of a contiguous tile: every row is in one channel, and a channel is a run
// of rows.
template <DType dtype, bool rare, int K, class Position, class Tensor>
DD_DEVICE void sum_rows(const Position& position, const NormBackward& a, const Tensor& x, const Tensor& dy,
                        const Shared& shared) {
    const int rows = static_cast<int>(a.plan.rows_each);
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const int row = x.row(position, i);
        if (!position.has(row)) continue;
        Affine maps[Position::kLength];
        load_maps(position, a, row, maps);
        float v[Position::kLength], g[Position::kLength];
        x.packs[i].floats(v);
        dy.packs[i].floats(g);
        Sums sums{};
#pragma unroll
        for (int k = 0; k < Position::kLength; ++k)
            add(sums, element<dtype, rare>(v[k], g[k], maps[k], a.options.activation));
        shared.entries[row - position.begin] = sums.dz;
        shared.entries[rows + row - position.begin] = sums.dz_d;
        shared.entries[2 * rows + row - position.begin] = sums.d;
    }
    __syncthreads();
    const int rows_per_channel = static_cast<int>(a.shape.pixels) / Position::kLength, lane = threadIdx.x % kWarp;
    for (int i = threadIdx.x / kWarp; i < kSums * a.plan.tile_channels; i += kNormThreads / kWarp) {
        const int channel = i % a.plan.tile_channels, kind = i / a.plan.tile_channels;
        int first = channel * rows_per_channel, last = first + rows_per_channel;
        if (first < position.begin) first = position.begin;
        if (last > position.end) last = position.end;
        float sum = 0.0f;
        for (int row = first + lane; row < last; row += kWarp) {
            sum += shared.entries[kind * rows + row - position.begin];
        }
        sum = warp_sum(sum);
        if (lane == 0) shared.partial[i] = sum;
    }
}

// Adds up the sums of the cluster's blocks: shared.total are those of the whole tile.
template <class Position>
DD_DEVICE void combine_sums(const Position& position, const Shared& shared) {
    const int blocks = position.plan.cluster;
    if (blocks > 1)
        cluster_sync();
    else
        __syncthreads();
    for (int i = threadIdx.x; i < kSums * position.plan.tile_channels; i += kNormThreads) {
        float partials[kPortableCluster] = {shared.partial[i]};
        if (blocks > 1) {
#pragma unroll
            for (int rank = 0; rank < kPortableCluster; ++rank) {  // all loads are in flight before one is needed
                partials[rank] = load_from_rank(&shared.partial[i], rank < blocks ? rank : 0);
            }
        }
        float sum = partials[0];
#pragma unroll
        for (int rank = 1; rank < kPortableCluster; ++rank) {
            if (rank < blocks) sum += partials[rank];
        }
        shared.total[i] = sum;
    }
    if (blocks > 1) cluster_arrive();  // no block may end while another reads its memory
    __syncthreads();
}

template <DType dtype, Access access, int K, bool rare>
__global__ void __launch_bounds__(kNormThreads, 2) resident_backward_kernel(const NormBackward a) {
    const auto position = resident_position<dtype, access>(a, blockIdx.x);
    const Shared shared(position);
    const Resident<Position<dtype, access>, K> x(position, a.x, a.skip, position.first_row()),
        dy(position, a.dy, position.first_row());
    Affine maps[position.kLength];
    GradientMap gradients[position.kLength];
    if constexpr (position.kSameChannels) {
        share_affines(position, a, shared.entries, maps);
        sum_columns<dtype, rare, K>(position, a, x, dy, maps, shared);
    } else {
        sum_rows<dtype, rare, K>(position, a, x, dy, shared);
    }
    combine_sums(position, shared);
    const int channels = a.plan.tile_channels;
    auto total = [&](int i) {
        return Sums{shared.total[i], shared.total[channels + i], shared.total[2 * channels + i]};
    };
    compute_gradient_maps(position, a, total, shared.gradients);
    __syncthreads();
    if (blockIdx.x % static_cast<unsigned>(a.plan.cluster) == 0) small_gradients(position, a, total, shared.gradients);
    auto gradient = [&](int channel) { return shared.gradients[position.group(channel)]; };
    // Recomputes the thread's position, which the compiler would spill if it were kept from the loads on.
    const auto out = resident_position<dtype, access>(a, opaque(blockIdx.x));
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const auto row = x.row(out, i);
        if (!out.has(row)) continue;
        if (!out.kSameChannels) load_maps(out, a, row, maps);
        out.per_channel(row, gradients, gradient);
        finish_row<dtype, rare>(out, a, row, x.packs[i], dy.packs[i], maps, gradients);
    }
    if (a.plan.cluster > 1) cluster_wait();
}

struct BackwardKernels {
    static constexpr const char* kName = "group_norm_silu_backward";

    static int64_t shared_bytes(const NormShape& shape, const NormPlan& plan) { return Shared::bytes(shape, plan); }

    template <DType dtype, Access access, bool rare>
    static auto holding(int resident) -> void (*)(NormBackward) {
        constexpr int most = most_resident(dtype, access, Direction::backward);
        return resident == 2 ? &resident_backward_kernel<dtype, access, 2, rare>
                             : &resident_backward_kernel<dtype, access, most, rare>;
    }
};

}  // namespace

int resident_backward_largest_cluster(const NormShape& shape, const NormPlan& plan) {
    return largest_cluster_of<BackwardKernels>(shape, plan);
}

void group_norm_silu_backward_resident(const NormBackward& a, cudaStream_t stream) {
    launch_resident<BackwardKernels>(a, stream);
}

}  // namespace dd::cuda
