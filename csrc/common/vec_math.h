// exp, log, sine and cosine of a Vec by minimax polynomials of least relative error. On a GPU a Vec is one float. The
// largest errors that are stated hold with and without FMA; tests/csrc/test_vec_math.py measures them.

#include "common/host_device.h"

namespace dd::DD_ISA {

// Returns e^v for every float, NaN and infinities included. Largest error: 1.1 ulp.
DD_HOST_DEVICE Vec exp(Vec v) {
    Vec x = clamp(v, -104.0f, 89.0f);  // beyond these the result is 0 or inf
    // Adding 1.5 * 2^23 leaves the nearest integer of x / ln 2 in the low bits.
    Vec shifted = fma(x, 1.44269504f, 12582912.0f);
    Vec n = shifted - 12582912.0f;
    Vec r = fma(n, -0.693145752f, x);  // ln 2 in two parts (Cody and Waite): the first has trailing zeros
    r = fma(n, -1.42860677e-6f, r);
    Vec p = fma(r, 1.395046331e-3f, 8.368875453e-3f);
    p = fma(p, r, 4.166620630e-2f);
    p = fma(p, r, 1.666651897e-1f);
    p = fma(p, r, 5.000000095e-1f);
    p = fma(p * r, r, r) + 1.0f;
    // Multiplies by 2^n in two factors: one alone would overflow, or lose the subnormal results.
    VecI k = as_int(shifted) - 0x4b400000;
    VecI half = k >> 1;
    return p * as_float((VecU)(half + 127) << 23) * as_float((VecU)(k - half + 127) << 23);
}

// p = 2^f for |f| <= 1/2, each operation for all n vectors before the next: a core whose threads share its queues looks
// too few operations ahead to overlap n whole chains.
template <int n>
DD_HOST_DEVICE void exp2_fractions(const Vec (&f)[n], Vec (&p)[n]) {
    for (int i = 0; i < n; ++i) p[i] = fma(f[i], 1.326459111e-3f, 9.671619162e-3f);
    for (int i = 0; i < n; ++i) p[i] = fma(p[i], f[i], 5.550735071e-2f);
    for (int i = 0; i < n; ++i) p[i] = fma(p[i], f[i], 2.402224094e-1f);
    for (int i = 0; i < n; ++i) p[i] = fma(p[i], f[i], 6.931470037e-1f);
    for (int i = 0; i < n; ++i) p[i] = fma(p[i], f[i], 1.0f);
}

// result = 2^v for v <= 127, and 0 for v <= -127. Largest error: 2.3 ulp.
template <int n>
DD_HOST_DEVICE void exp2(const Vec (&v)[n], Vec (&result)[n]) {
    Vec x[n], shifted[n], f[n], p[n];
    for (int i = 0; i < n; ++i) x[i] = clamp(v[i], -127.0f, 127.0f);
    // v = k + f: adding 1.5 * 2^23 leaves k in the low bits, and adding 127 makes it the exponent of a float.
    for (int i = 0; i < n; ++i) shifted[i] = x[i] + (12582912.0f + 127.0f);
    for (int i = 0; i < n; ++i) f[i] = x[i] + ((12582912.0f + 127.0f) - shifted[i]);
    exp2_fractions(f, p);
    for (int i = 0; i < n; ++i) result[i] = p[i] * as_float(as_uint(shifted[i]) << 23);
}

// Returns 1 + e^-v, the denominator of a sigmoid, for every float; inf for v < -88.4. Largest error: 1.4 (1 + |v|) ulp
// for v < 1, and 1.1 ulp from there on. It takes half the operations of exp(), because it reduces the argument by one
// product.
template <int n>
DD_HOST_DEVICE void one_plus_exp_minus(const Vec (&v)[n], Vec (&result)[n]) {
    Vec x[n], shifted[n], f[n], p[n];
    for (int i = 0; i < n; ++i) x[i] = clamp(v[i], -88.9f, 87.0f);
    // e^-v = 2^(k + f): adding 1.5 * 2^23 leaves k in the low bits, and adding 127 makes it the exponent of a float.
    for (int i = 0; i < n; ++i) shifted[i] = fma(x[i], -1.44269504f, 12582912.0f + 127.0f);
    for (int i = 0; i < n; ++i) f[i] = fma(x[i], -1.44269504f, (12582912.0f + 127.0f) - shifted[i]);
    exp2_fractions(f, p);
    for (int i = 0; i < n; ++i) result[i] = fma(p[i], as_float(as_uint(shifted[i]) << 23), 1.0f);
}

DD_HOST_DEVICE Vec one_plus_exp_minus(Vec v) {
    const Vec one[1] = {v};
    Vec result[1];
    one_plus_exp_minus(one, result);
    return result[0];
}

// Returns -2 ln v, given w = -2 v, for normal v > 0; the coefficients contain the factor. Largest error: 1.3 ulp in
// [2^-33, 1], near v = 1 too, where the result is near 0; it is exactly 0 at v = 1.
DD_HOST_DEVICE Vec minus_two_log(Vec w) {
    // v = 2^e (1 - g / 2) with 1 - g / 2 in [sqrt(1/2), sqrt(2)); exponent is e 2^23.
    VecU exponent = (as_uint(w) - 0xbfb504f3u) & 0xff800000u;
    Vec g = as_float(as_uint(w) - exponent) + 2.0f;
    Vec g2 = g * g;
    Vec p01 = fma(g, 8.333482593e-2f, 2.499999106e-1f);
    Vec p23 = fma(g, 1.247720886e-2f, 3.125322610e-2f);
    Vec p45 = fma(g, 2.325498965e-3f, 5.172455218e-3f);
    Vec p67 = fma(g, 3.507945512e-4f, 1.127061318e-3f);
    Vec p = fma(fma(g2, p67, p45), g2 * g2, fma(g2, p23, p01));
    return fma(to_float((VecI)exponent), -1.652591664e-7f, fma(p, g2, g));
}

// Computes sine and cosine of the angle 2 pi w 2^-32, up to the sign that both share. Returns that sign's bit, which
// the caller may apply to their common factor. The angle is reduced as an integer, without an error. Largest absolute
// error: 1.6e-7 for the sine and 2.1e-7 for the cosine.
DD_HOST_DEVICE VecU sincos_turns(VecU w, Vec& sine, Vec& cosine) {
    // The angle is x or x + pi, x in [-pi/2, pi/2); adding pi changes both signs.
    Vec x = to_float((VecI)(w << 1)) * 7.31459055e-10f;  // pi / 2^32
    Vec z = x * x;
    Vec z2 = z * z;
    Vec s = fma(fma(z, 2.608932662e-6f, -1.981111275e-4f), z2, fma(z, 8.333088167e-3f, -1.666666046e-1f));
    Vec c = fma(fma(z, -2.619381514e-7f, 2.476930424e-5f), z2, fma(z, -1.388856916e-3f, 4.166665577e-2f));
    sine = fma(s, x * z, x);
    cosine = fma(c, z2, fma(z, -0.5f, 1.0f));
    return (w + 0x40000000u) & 0x80000000u;
}

}  // namespace dd::DD_ISA
