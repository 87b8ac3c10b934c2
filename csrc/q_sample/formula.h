// x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) z: eq. 4 of DDPM (Ho, Jain and Abbeel, 2020). Included once per
// instruction set.

#include "common/host_device.h"

namespace dd::DD_ISA {

// One row of Schedule.marginal: the coefficients of a timestep.
struct Marginal {
    float sqrt_alpha_bar, sqrt_one_minus_alpha_bar;
};

template <class Value>
DD_HOST_DEVICE Value diffuse(Value x_start, Value noise, const Marginal& row) {
    return fma(x_start, row.sqrt_alpha_bar, noise * row.sqrt_one_minus_alpha_bar);
}

}  // namespace dd::DD_ISA
