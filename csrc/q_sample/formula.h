// Eq. 4 of DDPM (Ho, Jain, Abbeel, 2020). Read once per instruction set.

#include "common/host_device.h"

namespace dd::DD_ISA {

// One row of Schedule.marginal.
struct Marginal {
    float sqrt_alpha_bar, sqrt_one_minus_alpha_bar;
};

template <class Value>
DD_HOST_DEVICE Value diffuse(Value x_start, Value noise, const Marginal& row) {
    return fma(x_start, row.sqrt_alpha_bar, noise * row.sqrt_one_minus_alpha_bar);
}

}  // namespace dd::DD_ISA
