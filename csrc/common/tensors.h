// Turns torch's tensors into the plain structs of the kernels; tensor_checks.h does so with checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/layout.h"

namespace dd {

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10's name for it
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void refuse(const char* op, const char* name, const std::string& wanted, const std::string& got) {
    throw std::runtime_error(std::string("dd_kernels::") + op + ": " + name + " must be " + wanted + "; got " + got);
}

// Returns the dtype of x. Tensor::scalar_type() compares with every dtype by a call into torch; the numbers of those
// that the kernels take are asked for once.
inline ScalarType scalar_type_of(const Tensor& x) {
    static const int32_t float32 = aoti_torch_dtype_float32(), int64 = aoti_torch_dtype_int64(),
                         bfloat16 = aoti_torch_dtype_bfloat16();
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
    if (type == float32) return ScalarType::Float;
    if (type == int64) return ScalarType::Long;
    if (type == bfloat16) return ScalarType::BFloat16;
    return x.scalar_type();
}

inline DType dtype_of(const Tensor& x) {
    switch (scalar_type_of(x)) {
        case ScalarType::Float:
            return DType::float32;
        case ScalarType::BFloat16:
            return DType::bfloat16;
        case ScalarType::Half:
            return DType::float16;
        default:
            STD_TORCH_CHECK(false, "dd_kernels: the kernels take float32, bfloat16 and float16");
    }
}

// Returns whether dimensions 1.. of x are dense in the order of channels_last: [H][W][C] in memory.
inline bool is_channels_last(const Tensor& x) {
    if (x.dim() != 4) return false;
    int64_t expected = 1;
    for (int64_t d : {1, 3, 2, 0}) {
        if (x.size(d) != 1 && x.stride(d) != expected) return false;
        expected *= x.size(d);
    }
    return true;
}

// The approximate number of elements of a tile: a kernel holds half a dozen tiles in the L1 cache.
constexpr int64_t kTileElements = 1024;

inline Layout contiguous_layout(int64_t samples, int64_t elements) { return {samples, elements, 1, kTileElements}; }

inline Layout layout_of(const Tensor& x) {
    constexpr int64_t fewest_pixels = 32;
    if (x.numel() == 0) return contiguous_layout(0, 0);
    int64_t samples = x.size(0), elements = x.numel() / samples;
    if (x.is_contiguous()) return contiguous_layout(samples, elements);
    STD_TORCH_CHECK(is_channels_last(x), "dd_kernels: a tensor must be contiguous or channels_last");
    int64_t channels = x.size(1), pixels = kTileElements / channels / fewest_pixels * fewest_pixels;
    return {samples, elements / channels, channels, std::max(pixels, fewest_pixels)};
}

inline Operand operand(const Tensor& x) {
    int64_t stride = x.size(0) > 1 ? x.stride(0) : 0;
    return {const_cast<void*>(x.const_data_ptr()), stride, dtype_of(x)};
}

inline Operand operand(const std::optional<Tensor>& x) { return x.has_value() ? operand(*x) : Operand{}; }

template <class T>
const T* data(const Tensor& x) {
    return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& x) {
    return x.has_value() ? data<T>(*x) : nullptr;
}

}  // namespace dd
