// What this project's kernels use of CUDA, for a host compiler: tests build the .cu files with it and
// run them on the CPU. Found before CUDA's own header of this name by the order of include paths.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// An access to a vector that does not lie at a multiple of its size ends the process, as it ends a kernel.
template <size_t bytes>
struct Accessed {
    Accessed() = default;
    Accessed(const Accessed& from) { *this = from; }
    Accessed& operator=(const Accessed& from) {
        for (const Accessed* at : {static_cast<const Accessed*>(this), &from}) {
            if (reinterpret_cast<uintptr_t>(at) % bytes == 0) continue;
            std::fprintf(stderr, "CUDA on the host: misaligned address\n");
            std::abort();
        }
        return *this;
    }
};

struct alignas(16) uint4 : Accessed<16> {
    uint32_t x, y, z, w;

    uint4() = default;
    uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
};

struct float2 {
    float x, y;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim;

using cudaStream_t = void*;

// The subset of the runtime that launches a kernel.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
    struct {
        unsigned x, y, z;
    } clusterDim;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid argument";
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrL2CacheSize, cudaDevAttrComputeCapabilityMajor };

namespace host_cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024, kMaxGridY = 65535;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // more would need cudaFuncSetAttribute

struct Warp {
    fibers::Barrier barrier;
    uint32_t slots[2][kWarp];
};

struct Block {
    dim3 index;
    std::vector<char> shared;
    std::vector<Warp> warps;
    fibers::Barrier barrier;
    unsigned running;  // threads
};

struct Chip {
    int sm_count = 132, major = 9;
    int64_t l2_bytes = int64_t{60} << 20;
    int largest_cluster = 8;  // that its occupancy allows
    int ptx_version = 90;     // that its kernels were compiled for
};

// The device: one grid runs at a time, cluster by cluster.
struct Device {
    fibers::Scheduler scheduler;
    std::vector<Block> cluster;
    fibers::Barrier cluster_barrier;
    std::vector<unsigned> arrivals;  // the generation of the cluster's barrier that each thread has arrived in
    std::vector<unsigned> shuffles;  // how many each thread has made, for double buffering
    bool backwards = false, refuses = false;
    Chip chip;
    int ordinal = 0;  // every chip is a device of its own

    size_t current() const { return static_cast<size_t>(scheduler.current()); }
    unsigned thread() const { return static_cast<unsigned>(scheduler.current()) % blockDim.x; }
    unsigned rank() const { return static_cast<unsigned>(scheduler.current()) / blockDim.x; }
    Block& here() { return cluster[rank()]; }
};

inline Device device;

// Shared memory is exactly as long as the launch asked for, a sanitizer sees its end, and starts as NaN.
inline void begin_block(Block& block, dim3 index, size_t shared_bytes) {
    block.index = index;
    block.shared = std::vector<char>(shared_bytes, static_cast<char>(0xff));
    block.barrier = {static_cast<int>(blockDim.x), 0, 0};
    block.warps.assign(blockDim.x / kWarp, Warp{{static_cast<int>(kWarp), 0, 0}, {}});
    block.running = blockDim.x;
}

// Fills the shared memory of a block that has ended with NaN, which another block of its cluster then reads.
inline void end_thread(Block& block) {
    if (--block.running == 0) std::fill(block.shared.begin(), block.shared.end(), static_cast<char>(0xff));
}

inline bool valid(const cudaLaunchConfig_t& config, unsigned cluster) {
    return config.gridDim.x > 0 && config.gridDim.y > 0 && config.gridDim.y <= kMaxGridY && config.gridDim.z == 1 &&
           config.blockDim.x > 0 && config.blockDim.x % kWarp == 0 && config.blockDim.x <= kMaxThreads &&
           config.dynamicSmemBytes <= kMaxSharedBytes && cluster > 0 &&
           cluster <= static_cast<unsigned>(device.chip.largest_cluster) &&
           (cluster == 1 || (device.chip.major >= 9 && device.chip.ptx_version >= 90)) &&
           config.gridDim.x % cluster == 0;
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
    unsigned cluster = 1;
    for (unsigned i = 0; i < config.numAttrs; ++i) cluster = config.attrs[i].val.clusterDim.x;
    if (device.refuses || !valid(config, cluster)) return cudaErrorInvalidValue;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    device.cluster.resize(cluster);
    unsigned threads = cluster * config.blockDim.x;
    for (unsigned y = 0; y < config.gridDim.y; ++y) {
        for (unsigned x = 0; x < config.gridDim.x; x += cluster) {
            for (unsigned rank = 0; rank < cluster; ++rank) {
                begin_block(device.cluster[rank], dim3(x + rank, y), config.dynamicSmemBytes);
            }
            device.cluster_barrier = {static_cast<int>(threads), 0, 0};
            device.arrivals.assign(threads, 0);
            device.shuffles.assign(threads, 0);
            device.scheduler.run(static_cast<int>(cluster), static_cast<int>(blockDim.x), device.backwards, [&](int) {
                kernel();
                end_thread(device.here());
            });
        }
    }
    return cudaSuccess;
}

}  // namespace host_cuda

inline cudaError_t cudaGetDevice(int* device) {
    *device = host_cuda::device.ordinal;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
    const host_cuda::Chip& chip = host_cuda::device.chip;
    *value = name == cudaDevAttrMultiProcessorCount ? chip.sm_count
             : name == cudaDevAttrL2CacheSize       ? static_cast<int>(chip.l2_bytes)
                                                    : chip.major;
    return cudaSuccess;
}

inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
    *clusters = config->attrs->val.clusterDim.x <= static_cast<unsigned>(host_cuda::device.chip.largest_cluster);
    return host_cuda::device.chip.largest_cluster > 0 ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaFuncAttributes {
    int ptxVersion;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->ptxVersion = host_cuda::device.chip.ptx_version;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

#define threadIdx (dim3(host_cuda::device.thread(), 0, 0))
#define blockIdx (host_cuda::device.here().index)

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    return host_cuda::launch(*config, [&] { kernel(arguments...); });
}

inline void __syncthreads() { host_cuda::device.scheduler.wait(host_cuda::device.here().barrier); }

template <class To, class From>
To host_cuda_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
    auto& device = host_cuda::device;
    unsigned lane = device.thread() % host_cuda::kWarp;
    host_cuda::Warp& warp = device.here().warps[device.thread() / host_cuda::kWarp];
    uint32_t* slots = warp.slots[device.shuffles[device.current()]++ % 2];
    slots[lane] = host_cuda_bits<uint32_t>(value);
    device.scheduler.wait(warp.barrier);
    return host_cuda_bits<T>(slots[lane ^ static_cast<unsigned>(lane_mask)]);
}

inline float __uint_as_float(uint32_t bits) { return host_cuda_bits<float>(bits); }
inline uint32_t __float_as_uint(float value) { return host_cuda_bits<uint32_t>(value); }

template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T value) {
    *p = value;
}

// The functions that common/cuda_device.cuh writes in PTX.
namespace dd::cuda {

inline void store_16_bytes(void* p, uint4 words) { *static_cast<uint4*>(p) = words; }

inline uint32_t pack_bfloat16(float low, float high) {
    auto round = [](float v) {
        uint32_t bits = __float_as_uint(v);
        return v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

inline uint32_t pack_float16(float low, float high) {
    auto round = [](float v) -> uint32_t { return host_cuda_bits<uint16_t>(static_cast<_Float16>(v)); };
    return round(low) | round(high) << 16;
}

inline float float16_to_float(uint16_t bits) { return static_cast<float>(host_cuda_bits<_Float16>(bits)); }

inline float fast_exp2(float v) { return std::exp2(v); }
inline float fast_reciprocal(float v) { return 1.0f / v; }

inline float* shared_memory() { return reinterpret_cast<float*>(host_cuda::device.here().shared.data()); }

inline unsigned opaque(unsigned v) { return v; }
inline void cluster_arrive() {
    auto& device = host_cuda::device;
    device.arrivals[device.current()] = device.scheduler.arrive(device.cluster_barrier);
}
inline void cluster_wait() {
    auto& device = host_cuda::device;
    device.scheduler.wait(device.cluster_barrier, device.arrivals[device.current()]);
}
inline void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

inline float load_from_rank(const float* here, unsigned rank) {
    const char* mine = host_cuda::device.here().shared.data();
    auto offset = reinterpret_cast<const char*>(here) - mine;
    float value;
    std::memcpy(&value, host_cuda::device.cluster.at(rank).shared.data() + offset, sizeof value);
    return value;
}

}  // namespace dd::cuda
