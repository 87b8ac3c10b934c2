#include "group_norm_silu/cuda_backward.h"

#include "common/cuda_device.cuh"
#include "common/cuda_launch.h"

namespace dd::cuda {
namespace {

constexpr int kSegments = 8;  // of the samples; a warp to each

// Computes dweight and dbias: adds up what the samples contribute, in their order within a segment, then segment by
// segment.
__global__ void __launch_bounds__(kSegments* kWarp) parameter_kernel(const NormBackward a) {
    const int lane = threadIdx.x % kWarp, segment = threadIdx.x / kWarp;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
    const int64_t each = (a.shape.samples + kSegments - 1) / kSegments;
    const int64_t end = a.shape.samples < (segment + 1) * each ? a.shape.samples : (segment + 1) * each;
    const float* dbias = a.per_sample + a.shape.samples * a.shape.channels;
    float* sums = shared_memory();  // [2][kSegments][kWarp]
    float weight = 0.0f, bias = 0.0f;
    if (channel < a.shape.channels) {
#pragma unroll 8  // so many loads are in flight at once
        for (int64_t n = segment * each; n < end; ++n) {
            weight += a.per_sample[n * a.shape.channels + channel];
            bias += dbias[n * a.shape.channels + channel];
        }
    }
    sums[threadIdx.x] = weight;
    sums[kSegments * kWarp + threadIdx.x] = bias;
    __syncthreads();
    if (segment != 0 || channel >= a.shape.channels) return;
    for (int i = 1; i < kSegments; ++i) {
        weight += sums[i * kWarp + lane];
        bias += sums[(kSegments + i) * kWarp + lane];
    }
    if (a.dweight) a.dweight[channel] = weight;
    if (a.dbias) a.dbias[channel] = bias;
}

}  // namespace

NormPlan plan_backward(const NormShape& shape) {
    auto largest_cluster = [&](const NormPlan& plan) { return resident_backward_largest_cluster(shape, plan); };
    return plan_to_run(shape, Direction::backward, current_chip(), largest_cluster);
}

void group_norm_silu_backward(const NormBackward& a, cudaStream_t stream) {
    if (a.plan.regime == Regime::resident) {
        group_norm_silu_backward_resident(a, stream);
    } else {
        group_norm_silu_backward_split(a, stream);
    }
    if (a.dweight || a.dbias) {
        const Grid grid{ceil_div(a.shape.channels, kWarp), 1, kSegments * kWarp, 8 * kSegments * kWarp};
        launch("group_norm_silu_backward", parameter_kernel, grid, stream, a);
    }
}

}  // namespace dd::cuda
