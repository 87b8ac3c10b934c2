// How the CUDA kernels apply an activation: which functor of common/activation.h, and in which arithmetic.
#pragma once

#include <type_traits>

#include "common/cuda_device.cuh"
#include "common/cuda_math.cuh"
#include "group_norm_silu/cuda.h"
// cuda_math.cuh defines the functions that the functors are written with.
#include "common/activation.h"

namespace dd::cuda {

// A float in the arithmetic of a 16-bit SiLU, to 2^-21: two instructions of the special function unit, where float32
// takes the polynomial and division of vec_math.h.
struct Approximate {
    float v;
};

template <int n>
DD_DEVICE void one_plus_exp_minus(const Approximate (&z)[n], Approximate (&e)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) e[i] = {1.0f + fast_exp2(z[i].v * -1.44269504f)};
}
// Where e^-z overflows, z / inf would be 0 times the reciprocal of inf: -0, as it should be.
DD_DEVICE Approximate operator/(Approximate a, Approximate b) { return {a.v * fast_reciprocal(b.v)}; }
DD_DEVICE Approximate operator/(float a, Approximate b) { return {a * fast_reciprocal(b.v)}; }
DD_DEVICE Approximate operator*(Approximate a, Approximate b) { return {a.v * b.v}; }
DD_DEVICE Approximate operator-(float a, Approximate b) { return {a - b.v}; }
DD_DEVICE Approximate fma(Approximate a, Approximate b, float c) { return {fma(a.v, b.v, c)}; }

// Every kernel is compiled twice: with none and SiLU inline, and for the rarer activations with a call of a function
// that switches at run time. An instance for each of them would multiply the time that nvcc takes.
constexpr int kNone = 0, kSilu = 1;
static_assert(kActivations == Activations::kCount, "cuda.h says how many activations there are");

static __device__ __attribute__((noinline)) float rare_value(float z, int activation) {
    Activations::visit(activation, [&](auto functor) {
        float value[1] = {z};
        activate<decltype(functor)>(value);
        z = value[0];
    });
    return z;
}

static __device__ __attribute__((noinline)) float rare_gradient(float dy, float z, int activation) {
    Activations::visit(activation, [&](auto functor) { dy = activation_gradient<decltype(functor)>(dy, z); });
    return dy;
}

// Calls start(rare), a std::bool_constant that kernels take as their last template argument.
template <class Start>
auto for_activation(int activation, const Start& start) {
    return activation > kSilu ? start(std::true_type{}) : start(std::false_type{});
}

// Returns the value of an activation whose argument or result has this dtype.
template <DType dtype, bool rare>
DD_DEVICE float activate(float z, int activation) {
    if constexpr (rare) return rare_value(z, activation);
    if (activation == kNone) return z;
    if constexpr (dtype == DType::float32) {
        float value[1] = {z};
        activate<Silu>(value);
        return value[0];
    } else {
        Approximate value[1] = {{z}};
        activate<Silu>(value);
        return value[0].v;
    }
}

// Returns dL/dz, given dL/dy.
template <DType dtype, bool rare>
DD_DEVICE float activation_slope(float dy, float z, int activation) {
    if constexpr (rare) return rare_gradient(dy, z, activation);
    if (activation == kNone) return dy;
    if constexpr (dtype == DType::float32) return activation_gradient<Silu>(dy, z);
    return activation_gradient<Silu>(Approximate{dy}, Approximate{z}).v;
}

}  // namespace dd::cuda
