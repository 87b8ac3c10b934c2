// Forward for small contiguous images: a group in the registers of each warp.
#include "group_norm_silu/cuda_position.cuh"
#include "group_norm_silu/cuda_regimes.h"

namespace dd::cuda {
namespace {

template <DType dtype, int K, bool rare>
__global__ void __launch_bounds__(kNormWarps* kWarp, 8) warp_kernel(const NormForward a) {
    constexpr int length = vector_length(dtype);
    using Packed = Pack<dtype, false>;
    const int lane = threadIdx.x % kWarp, vectors = static_cast<int>(a.plan.rows);
    const unsigned tile = blockIdx.x * kNormWarps + threadIdx.x / kWarp;
    if (tile >= a.plan.tiles) return;
    const int64_t first_element = static_cast<int64_t>(tile) * vectors * length;
    const unsigned sample = tile / static_cast<unsigned>(a.shape.groups);
    const int64_t first_channel =
        static_cast<int64_t>(tile % static_cast<unsigned>(a.shape.groups)) * a.plan.group_channels;
    auto channel = [&](int vector) {
        return first_channel + static_cast<unsigned>(vector * length) / static_cast<unsigned>(a.shape.pixels);
    };
    auto options = [&](int vector) { return channel_options(a.options, a.shape, sample, channel(vector)); };

    const int64_t seam = (a.shape.x_channels - first_channel) * a.shape.pixels;  // elements from here on are skip's
    auto part = [&](int vector) {
        ConcatElement part(a.shape, vector * length >= seam, sample, first_channel, a.shape.pixels);
        part.element += vector * length;
        return part;
    };

    Packed resident[K];
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const int vector = lane + i * kWarp;
        if (vector < vectors) resident[i] = Packed::load(part(vector).of(a.x, a.skip), part(vector).element);
    }
    if (a.residual) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const int vector = lane + i * kWarp;
            if (vector >= vectors || part(vector).in_skip) continue;
            resident[i] = resident[i] + Packed::template load<true>(a.residual, part(vector).element);
            resident[i].store(a.sum, part(vector).element);
        }
    }
    auto each = [&](const auto& visit) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const int vector = lane + i * kWarp;
            if (vector >= vectors) continue;
            float v[length];
            resident[i].floats(v);
            const float shift = parameter(a.options.pre_shift, sample * a.shape.channels + channel(vector), 0.0f);
#pragma unroll
            for (int k = 0; k < length; ++k) visit(v[k] + shift);
        }
    };
    const float count = static_cast<float>(vectors * length);
    float sum = 0.0f, squares = 0.0f;
    each([&](float v) { sum += v; });
    const float mean = warp_sum(sum) / count;
    each([&](float v) { squares = fma(v - mean, v - mean, squares); });
    const float rstd = reciprocal_sqrt(warp_sum(squares) / count + a.eps);
    if (lane == 0) {
        a.mean[tile] = mean;
        a.rstd[tile] = rstd;
    }
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const int vector = lane + i * kWarp;
        if (vector >= vectors) continue;
        float v[length];
        resident[i].floats(v);
        const Affine map = exact_affine(mean, rstd, options(vector));
#pragma unroll
        for (int k = 0; k < length; ++k) {
            const float z = fma(v[k] - map.centre, map.gain, map.offset);
            v[k] = activate<dtype, rare>(z, a.options.activation);
        }
        Packed::of(v).store(a.y, first_element + vector * length);
    }
}

}  // namespace

void group_norm_silu_warp(const NormForward& a, cudaStream_t stream) {
    for_activation(a.options.activation, [&](auto rare) {
        for_dtype(a.shape.dtype, [&](auto dtype) {
            auto kernel = a.plan.resident == 2 ? &warp_kernel<dtype.value, 2, rare.value>
                                               : &warp_kernel<dtype.value, kMostResidentPerWarp, rare.value>;
            launch("group_norm_silu", kernel, {ceil_div(a.plan.tiles, kNormWarps), 1, kNormWarps * kWarp}, stream, a);
        });
    });
}

}  // namespace dd::cuda
