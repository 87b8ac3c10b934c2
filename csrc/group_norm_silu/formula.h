// GroupNorm, scale-shift and SiLU, and their gradients. Read once per instruction set.

#include "common/host_device.h"

namespace dd::DD_ISA {

// What one channel of one sample is given; Real is the type its few values are computed in.
template <class Real>
struct ChannelOptions {
    Real weight, bias, pre_shift, scale, shift;
};

// z = ((x + pre_shift - mean) rstd weight + bias) (1 + scale) + shift = (x - centre) gain + offset.
// The centre goes first, so that nothing cancels where the mean is large beside the deviation, and
// what rounding took from the centre comes back in the offset.
struct Affine {
    float centre, gain, offset;
};

template <class Real>
DD_HOST_DEVICE Affine affine(Real mean, Real rstd, const ChannelOptions<Real>& o) {
    Real exact = mean - o.pre_shift;
    float centre = static_cast<float>(exact);
    Real gain = rstd * o.weight * (1 + o.scale);
    Real offset = o.bias * (1 + o.scale) + o.shift + (centre - exact) * gain;
    return {centre, static_cast<float>(gain), static_cast<float>(offset)};
}

template <bool with_silu, class Value>
DD_HOST_DEVICE Value activation(Value z) {
    if constexpr (with_silu) return z / one_plus_exp_minus(z);
    return z;
}

// The same of n side by side, in place.
template <bool with_silu, class Value, int n>
DD_HOST_DEVICE void activate(Value (&z)[n]) {
    if constexpr (with_silu) {
        Value denominator[n];
        one_plus_exp_minus(z, denominator);
        for (int i = 0; i < n; ++i) z[i] = z[i] / denominator[i];
    }
}

// dL/dz from dL/dy and the denominator 1 + e^-z of s = sigmoid(z): silu'(z) = s (1 + z (1 - s)).
template <class Value>
DD_HOST_DEVICE Value silu_gradient(Value dy, Value z, Value denominator) {
    Value s = 1.0f / denominator;
    return dy * s * fma(z, 1.0f - s, 1.0f);
}

template <bool with_silu, class Value>
DD_HOST_DEVICE Value activation_gradient(Value dy, Value z) {
    if constexpr (with_silu) return silu_gradient(dy, z, one_plus_exp_minus(z));
    return dy;
}

// n = (x + pre_shift - mean) rstd is d rstd + remainder, remainder what the centre's rounding took.
template <class Real>
DD_HOST_DEVICE Real centre_remainder(float centre, Real mean, Real rstd, const ChannelOptions<Real>& o) {
    return (centre - (mean - o.pre_shift)) * rstd;
}

// With dn = dz weight (1 + scale), and means over the group (Wu & He, 2018, differentiated),
//   dx = rstd (dn - mean(dn) - n mean(dn n)) = dz gain + d slope + level.
struct GroupLine {
    float slope, level;
};

template <class Real>
DD_HOST_DEVICE GroupLine group_line(Real mean_dn, Real mean_dn_n, Real rstd, Real remainder) {
    return {static_cast<float>(-rstd * rstd * mean_dn_n),
            static_cast<float>(-rstd * (mean_dn + remainder * mean_dn_n))};
}

}  // namespace dd::DD_ISA
