// One loop for each function of csrc/common/vec_math.h. Included once per instruction set.

namespace dd::DD_ISA {

DD_INLINE VecU load_words(const uint32_t* p, int64_t left) {
    VecU words{};
    __builtin_memcpy(&words, p, static_cast<size_t>(left < kLanes ? left : kLanes) * sizeof *p);
    return words;
}

inline void exp_of(const float* from, float* to, int64_t n) {
    for_vectors(n, [&](int64_t i, int64_t left) { store(to + i, left, exp(load(from + i, left))); });
}

inline void exp2_of(const float* from, float* to, int64_t n) {
    for_vectors(n, [&](int64_t i, int64_t left) {
        const Vec one[1] = {load(from + i, left)};
        Vec power[1];
        exp2(one, power);
        store(to + i, left, power[0]);
    });
}

inline void one_plus_exp_minus_of(const float* from, float* to, int64_t n) {
    for_vectors(n, [&](int64_t i, int64_t left) { store(to + i, left, one_plus_exp_minus(load(from + i, left))); });
}

inline void minus_two_log_of(const float* from, float* to, int64_t n) {
    for_vectors(n, [&](int64_t i, int64_t left) { store(to + i, left, minus_two_log(load(from + i, left) * -2.0f)); });
}

inline void minus_two_uniform_of(const uint32_t* from, float* to, int64_t n) {
    for_vectors(n,
                [&](int64_t i, int64_t left) { store(to + i, left, minus_two_uniform(load_words(from + i, left))); });
}

inline void sine_of(const uint32_t* from, float* to, int64_t n) {
    for_vectors(n, [&](int64_t i, int64_t left) {
        Vec sine, cosine;
        VecU sign = sincos_turns(load_words(from + i, left), sine, cosine);
        store(to + i, left, as_float(as_uint(sine) ^ sign));
    });
}

inline void cosine_of(const uint32_t* from, float* to, int64_t n) {
    for_vectors(n, [&](int64_t i, int64_t left) {
        Vec sine, cosine;
        VecU sign = sincos_turns(load_words(from + i, left), sine, cosine);
        store(to + i, left, as_float(as_uint(cosine) ^ sign));
    });
}

}  // namespace dd::DD_ISA
