// Loads, stores and conversions of CUDA kernels: 16 bytes at a time, as floats whatever the dtype in memory. Also wraps
// the PTX instructions that CUDA C++ has no cheap function for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/layout.h"

#define DD_DEVICE __device__ __forceinline__

namespace dd::cuda {

// Where a host compiler builds the kernels for a test, tests/csrc/host defines these functions.
#ifdef __CUDACC__

// Returns two floats, rounded to nearest even, in the low and the high half of a word.
DD_DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

DD_DEVICE uint32_t pack_float16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

DD_DEVICE float float16_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Stores in one access. The compiler splits an assignment of values that a condition selected into four.
DD_DEVICE void store_16_bytes(void* p, uint4 words) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
}

// 2^v and 1 / v within 2 ulp (PTX ISA), by one instruction of the special function unit each; subnormals become 0.
DD_DEVICE float fast_exp2(float v) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}

DD_DEVICE float fast_reciprocal(float v) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}

// Optimisation barrier: hides v from the compiler, which then recomputes what depends on it instead of keeping it in
// registers.
DD_DEVICE unsigned opaque(unsigned v) {
    unsigned same;
    asm volatile("mov.u32 %0, %1;" : "=r"(same) : "r"(v));
    return same;
}

// Returns the block's dynamic shared memory.
DD_DEVICE float* shared_memory() {
    extern __shared__ float4 memory[];
    return reinterpret_cast<float*>(memory);
}

// Functions of a thread-block cluster. Before Hopper every cluster is a single block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

DD_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// A barrier in two halves that orders no memory: no block passes the second before all have passed the first. After it
// a block that others have read from may end. A barrier with release semantics would also wait for the block's stores.
DD_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DD_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Returns the value at the same address in the shared memory of the cluster's block `rank`.
DD_DEVICE float load_from_rank(const float* here, unsigned rank) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(here));
    float value;
    asm volatile(
        "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %1, %2;\n\t"
        "ld.shared::cluster.f32 %0, [there];\n\t}"
        : "=f"(value)
        : "r"(address), "r"(rank)
        : "memory");
    return value;
}

#else

DD_DEVICE void cluster_sync() { __syncthreads(); }
DD_DEVICE void cluster_arrive() {}
DD_DEVICE void cluster_wait() {}
DD_DEVICE float load_from_rank(const float* here, unsigned) { return *here; }

#endif
#endif  // __CUDACC__

DD_DEVICE float bfloat16_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }

constexpr int kWarp = 32;

// Returns the sum over a warp, with the same bits in every lane.
DD_DEVICE float warp_sum(float v) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
    return v;
}

// Returns how many elements 16 bytes hold.
DD_HOST_DEVICE constexpr int vector_length(DType dtype) { return dtype == DType::float32 ? 4 : 8; }

DD_HOST_DEVICE constexpr int element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <DType dtype>
DD_DEVICE void unpack(uint4 words, float* v) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (dtype == DType::float32) {
            v[i] = __uint_as_float(word[i]);
        } else if constexpr (dtype == DType::bfloat16) {
            v[2 * i] = __uint_as_float(word[i] << 16);
            v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        } else {
            v[2 * i] = float16_to_float(static_cast<uint16_t>(word[i]));
            v[2 * i + 1] = float16_to_float(static_cast<uint16_t>(word[i] >> 16));
        }
    }
}

template <DType dtype>
DD_DEVICE uint4 pack(const float* v) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (dtype == DType::float32) {
            word[i] = __float_as_uint(v[i]);
        } else if constexpr (dtype == DType::bfloat16) {
            word[i] = pack_bfloat16(v[2 * i], v[2 * i + 1]);
        } else {
            word[i] = pack_float16(v[2 * i], v[2 * i + 1]);
        }
    }
    return {word[0], word[1], word[2], word[3]};
}

// Rounds a float to the dtype, as storing it in a tensor would.
template <DType dtype>
DD_DEVICE float round_to(float v) {
    if constexpr (dtype == DType::bfloat16) return bfloat16_to_float(pack_bfloat16(v, 0.0f));
    if constexpr (dtype == DType::float16) return float16_to_float(static_cast<uint16_t>(pack_float16(v, 0.0f)));
    return v;
}

DD_DEVICE float load_element(const void* data, int64_t i, DType dtype) {
    if (dtype == DType::float32) return static_cast<const float*>(data)[i];
    uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == DType::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

DD_DEVICE void store_element(void* data, int64_t i, DType dtype, float v) {
    if (dtype == DType::float32) {
        static_cast<float*>(data)[i] = v;
    } else {
        uint32_t word = dtype == DType::bfloat16 ? pack_bfloat16(v, 0.0f) : pack_float16(v, 0.0f);
        static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(word);
    }
}

}  // namespace dd::cuda
