// GroupNorm with its shifts and scales, and their gradients; common/activation.h has the activation that follows. Read
// once per instruction set.

#include "common/host_device.h"

namespace dd::DD_ISA {

// The options of one channel of one sample; Real is the type in which its few values are computed.
template <class Real>
struct ChannelOptions {
    Real weight, bias, pre_shift, scale, shift;
};

// z = ((x + pre_shift - mean) rstd weight + bias) (1 + scale) + shift = (x - centre) gain + offset.
// The centre is subtracted first, so that nothing cancels where the mean is large beside the deviation; the rounding
// error of the centre is added back in the offset.
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

// The remainder in n = (x + pre_shift - mean) rstd = d rstd + remainder, d = x - centre: the centre's rounding error.
template <class Real>
DD_HOST_DEVICE Real centre_remainder(float centre, Real mean, Real rstd, const ChannelOptions<Real>& o) {
    return (centre - (mean - o.pre_shift)) * rstd;
}

// With dn = dz weight (1 + scale), and means over the group (Wu & He, 2018, differentiated),
//   dx = rstd (dn - mean(dn) - n mean(dn n)) = dz gain + d slope + level.
struct GradientMap {
    float slope, level;
};

template <class Real>
DD_HOST_DEVICE GradientMap gradient_map(Real mean_dn, Real mean_dn_n, Real rstd, Real remainder) {
    return {static_cast<float>(-rstd * rstd * mean_dn_n),
            static_cast<float>(-rstd * (mean_dn + remainder * mean_dn_n))};
}

}  // namespace dd::DD_ISA
