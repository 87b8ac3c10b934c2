// Turns random words into normals. Included once per instruction set.
//
// Box and Muller (1958): with u = (radius_word + 1) 2^-32 in (0, 1] and v = angle_word 2^-32,
//     z = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v).
// u is rounded to float; the angle uses all 32 bits. Largest error of a normal: 1e-6 (NORMAL_ERROR in
// tests/ops/budget.py).

#include "common/host_device.h"

namespace dd::DD_ISA {

template <class Word>
DD_HOST_DEVICE auto minus_two_log_uniform(Word radius_word) {
    return minus_two_log(minus_two_uniform(radius_word));
}

// Computes the point at the angle 2 pi v on the circle of the given radius around 0.
template <class Value, class Word>
DD_HOST_DEVICE void on_circle(Value squared_radius, Word angle_word, Value& z0, Value& z1) {
    Value sine, cosine;
    Word sign = sincos_turns(angle_word, sine, cosine);
    Value radius = as_float(as_uint(sqrt(squared_radius)) ^ sign);
    z0 = radius * cosine;
    z1 = radius * sine;
}

template <class Value, class Word>
DD_HOST_DEVICE void box_muller(Word radius_word, Word angle_word, Value& z0, Value& z1) {
    on_circle(Value(minus_two_log_uniform(radius_word)), angle_word, z0, z1);
}

}  // namespace dd::DD_ISA
