// Functions by which tests control the CUDA kernels on the host, through ctypes.
#include <cuda_runtime.h>

#include <iterator>

#include "common/cuda_launch.h"
#include "group_norm_silu/cuda_backward.h"

static void nothing(int) {}

#pragma GCC visibility push(default)
extern "C" {

// Sets the chip that kernels are planned for.
void dd_host_chip(int sm_count, int major, int64_t l2_bytes, int largest_cluster, int ptx_version) {
    host_cuda::device.chip = {sm_count, major, l2_bytes, largest_cluster, ptx_version};
    ++host_cuda::device.ordinal;
}

// Sets whether a block's last thread runs first.
void dd_host_backwards(bool backwards) { host_cuda::device.backwards = backwards; }

// Sets whether every launch is refused.
void dd_host_refuse(bool refuses) { host_cuda::device.refuses = refuses; }

// Returns whether a grid of so many blocks can be launched.
bool dd_host_launches(int64_t blocks) try {
    dd::cuda::launch("nothing", &nothing, {blocks, 1, static_cast<int>(host_cuda::kWarp)}, nullptr, 0);
    return true;
} catch (const std::runtime_error&) {
    return false;
}

// shape: samples, channels, pixels, groups, channels_last, aligned, dtype, backward, x_channels. plan: regime, access,
// resident, cluster, splits, tile_channels, tiles, wave_tiles, rows, rows_each, partials.
void dd_host_plan(const int64_t* shape, int64_t* plan) {
    using namespace dd::cuda;
    const NormShape s = {
        shape[0], shape[1], shape[2], shape[3], shape[4] != 0, shape[5] != 0, static_cast<dd::DType>(shape[6]),
        shape[8]};
    const NormPlan p = shape[7] ? plan_backward(s) : plan_forward(s);
    const int64_t partials = shape[7] ? per_sample_floats(s) + sum_floats(s, p) : forward_partials(s, p);
    const int64_t values[] = {static_cast<int64_t>(p.regime),
                              static_cast<int64_t>(p.access),
                              p.resident,
                              p.cluster,
                              p.splits,
                              p.tile_channels,
                              p.tiles,
                              p.wave_tiles,
                              p.rows,
                              p.rows_each,
                              partials};
    std::copy(std::begin(values), std::end(values), plan);
}
}
#pragma GCC visibility pop
