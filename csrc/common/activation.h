// The activations, a functor each, and their numbers. Read once per instruction set, after vec_math.h or its CUDA
// counterpart.
//
// To add one: write a functor, and append its name to Activations.

#include "common/host_device.h"

namespace dd::DD_ISA {

// A functor has three parts, for a Vec (or a float on a GPU):
//   exponentials(z, e)     e[i], the one exponential that value and gradient of z[i] need; n side by side
//   value(z, e)            the activation of z
//   gradient(dy, z, e)     dL/dz from dL/dy
// and says with kIdentity whether it leaves z as it is, so that kernels skip all three.

struct Identity {
    static constexpr bool kIdentity = true;

    template <class Value, int n>
    DD_HOST_DEVICE static void exponentials(const Value (&)[n], Value (&)[n]) {}
    template <class Value>
    DD_HOST_DEVICE static Value value(Value z, Value) {
        return z;
    }
    template <class Value>
    DD_HOST_DEVICE static Value gradient(Value dy, Value, Value) {
        return dy;
    }
};

// What the activations that are made of s = sigmoid(z) share: e = 1 + e^-z, so that s = 1 / e.
struct OfSigmoid {
    static constexpr bool kIdentity = false;

    template <class Value, int n>
    DD_HOST_DEVICE static void exponentials(const Value (&z)[n], Value (&e)[n]) {
        one_plus_exp_minus(z, e);
    }
};

// silu(z) = z s with s = sigmoid(z) = 1 / e, e = 1 + e^-z; silu'(z) = s (1 + z (1 - s)).
struct Silu : OfSigmoid {
    template <class Value>
    DD_HOST_DEVICE static Value value(Value z, Value e) {
        return z / e;
    }
    template <class Value>
    DD_HOST_DEVICE static Value gradient(Value dy, Value z, Value e) {
        const Value s = 1.0f / e;
        return dy * s * fma(z, 1.0f - s, 1.0f);
    }
};

// mish(z) = z tanh(ln(1 + e^z)). With s = sigmoid(z) and t = s (2 - s) = 1 - (1 - s)^2 that is z t / (2 - t), in which
// nothing cancels or overflows, and mish'(z) = t / (2 - t) + 4 z s ((1 - s) / (2 - t))^2.
struct Mish : OfSigmoid {
    template <class Value>
    DD_HOST_DEVICE static Value value(Value z, Value e) {
        const Value s = 1.0f / e, t = s * (2.0f - s);
        return z * (t / (2.0f - t));
    }
    template <class Value>
    DD_HOST_DEVICE static Value gradient(Value dy, Value z, Value e) {
        const Value s = 1.0f / e, t = s * (2.0f - s), q = 1.0f / (2.0f - t), w = (1.0f - s) * q;
        return dy * fma(z * s, 4.0f * (w * w), t * q);
    }
};

// gelu(z) = z P(z), P the normal distribution function, and gelu'(z) = P(z) + z e / sqrt(2 pi), with e = e^(-z^2 / 2).
struct Gelu {
    static constexpr bool kIdentity = false;

    template <class Value, int n>
    DD_HOST_DEVICE static void exponentials(const Value (&z)[n], Value (&e)[n]) {
        for (int i = 0; i < n; ++i) e[i] = exp(z[i] * z[i] * -0.5f);
    }
    template <class Value>
    DD_HOST_DEVICE static Value value(Value z, Value e) {
        return z * probability(z, e);
    }
    template <class Value>
    DD_HOST_DEVICE static Value gradient(Value dy, Value z, Value e) {
        return dy * fma(z * e, 0.398942280f, probability(z, e));
    }

    // P(-x) = e^(-x^2 / 2) t p(t) for x >= 0, with t = 1 / (1 + 0.35 x): p, a minimax polynomial, is within 3.2e-8 of
    // the ratio, which falls slowly; evaluated in float32, t p(t) is within 3.5e-7.
    template <class Value>
    DD_HOST_DEVICE static Value probability(Value z, Value e) {
        const Value t = 1.0f / fma(abs(z), 0.35f, 1.0f);
        Value p = fma(t, -2.9159638e-2f, 1.4403957e-1f);
        p = fma(p, t, -2.5585717e-1f);
        p = fma(p, t, 1.5934080e-1f);
        p = fma(p, t, -2.3227159e-2f);
        p = fma(p, t, 1.0555890e-1f);
        p = fma(p, t, 1.1981963e-1f);
        p = fma(p, t, 1.3986375e-1f);
        p = fma(p, t, 1.3962129e-1f);
        const Value tail = e * (t * p);
        return select(z < 0.0f, tail, 1.0f - tail);
    }
};

// gelu_tanh(z) = z / 2 (1 + tanh(v / 2)) = z sigmoid(v), v = 2 sqrt(2 / pi) (z + 0.044715 z^3), e = 1 + e^-v.
struct GeluTanh {
    static constexpr bool kIdentity = false;
    static constexpr float kLinear = 1.59576912f, kCubic = 7.13548163e-2f;

    template <class Value, int n>
    DD_HOST_DEVICE static void exponentials(const Value (&z)[n], Value (&e)[n]) {
        Value v[n];
        for (int i = 0; i < n; ++i) v[i] = z[i] * fma(z[i] * z[i], kCubic, kLinear);
        one_plus_exp_minus(v, e);
    }
    template <class Value>
    DD_HOST_DEVICE static Value value(Value z, Value e) {
        return z / e;
    }
    template <class Value>
    DD_HOST_DEVICE static Value gradient(Value dy, Value z, Value e) {
        const Value s = 1.0f / e, near = clamp(z, -20.0f, 20.0f);  // beyond, s is 0 or 1, and z^3 may be inf
        return dy * s * fma(near * (1.0f - s), fma(near * near, 3.0f * kCubic, kLinear), 1.0f);
    }
};

template <class... Functors>
struct ActivationList {
    static constexpr int kCount = sizeof...(Functors);

    // Calls visit(functor) with the functor of that number.
    template <class Visit>
    DD_HOST_DEVICE static void visit(int number, const Visit& visit) {
        int next = 0;
        static_cast<void>(((next++ == number && (visit(Functors{}), true)) || ...));
    }
};

// In the order of class Activation in dd_kernels/ops/activation.py.
using Activations = ActivationList<Identity, Silu, Mish, Gelu, GeluTanh>;

// Applies an activation to n values side by side, in place.
template <class Activation, class Value, int n>
DD_HOST_DEVICE void activate(Value (&z)[n]) {
    if constexpr (!Activation::kIdentity) {
        Value e[n];
        Activation::exponentials(z, e);
        for (int i = 0; i < n; ++i) z[i] = Activation::value(z[i], e[i]);
    }
}

// Returns dL/dz, given dL/dy.
template <class Activation, class Value>
DD_HOST_DEVICE Value activation_gradient(Value dy, Value z) {
    if constexpr (Activation::kIdentity) return dy;
    const Value one[1] = {z};
    Value e[1];
    Activation::exponentials(one, e);
    return Activation::gradient(dy, z, e[0]);
}

}  // namespace dd::DD_ISA
