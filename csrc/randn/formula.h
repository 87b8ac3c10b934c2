// From random words to normals. Read once per instruction set.

#include "common/host_device.h"

namespace dd::DD_ISA {

// Box and Muller (1958): u = (radius_word + 1) 2^-32 in (0, 1], v = angle_word 2^-32,
// z = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v). u is rounded to float; the angle comes from all 32 bits.
template <class Value, class Word>
DD_HOST_DEVICE void box_muller(Word radius_word, Word angle_word, Value& z0, Value& z1) {
    Value u = (to_float(radius_word) + 1.0f) * 0x1p-32f;
    Value radius = sqrt(log(u) * -2.0f);
    Value sine, cosine;
    sincos_turns(angle_word, sine, cosine);
    z0 = radius * cosine;
    z1 = radius * sine;
}

}  // namespace dd::DD_ISA
