// Draws the normals of consecutive elements, for every kernel that needs noise. Included once per instruction set.

#include "common/philox.h"
#include "randn/formula.h"

namespace dd::DD_ISA {

// One word of Philox's counter for several vectors of counters. The rounds of one vector depend on each other; four
// vectors side by side hide their latency.
constexpr int kChains = 4;
struct Words {
    VecU64 chain[kChains];
};

template <class Part>
DD_INLINE Words each_chain(Part part) {
    Words words;
    for (int i = 0; i < kChains; ++i) words.chain[i] = part(i);
    return words;
}

DD_INLINE Words wide_product(const Words& a, uint32_t b) {
    return each_chain([&](int i) { return wide_product(a.chain[i], b); });
}
DD_INLINE Words high_word(const Words& product) {
    return each_chain([&](int i) { return high_word(product.chain[i]); });
}
DD_INLINE Words low_word(const Words& product) { return product; }
DD_INLINE Words operator^(const Words& a, const Words& b) {
    return each_chain([&](int i) { return a.chain[i] ^ b.chain[i]; });
}
DD_INLINE Words operator^(const Words& a, uint32_t b) {
    return each_chain([&](int i) { return a.chain[i] ^ b; });
}

constexpr int kNoiseBlock = 2 * kChains * kLanes;

// Computes the random words of kNoiseBlock elements from the element 4 * quad on. Each chain gives a vector of words
// for radii and one for angles, which has two for every quad.
DD_INLINE void random_words(int64_t quad, const NoiseCounter& at, VecU radius[kChains], VecU angle[kChains]) {
    Words words[4];
    words[0] = each_chain([&](int i) {
        uint64_t first = static_cast<uint64_t>(quad) + static_cast<uint64_t>(i * kLanes / 2);
        // The quads are in the order from which zip() puts the elements in theirs.
#if DD_LANES == 16
        return VecU64{0, 4, 1, 5, 2, 6, 3, 7} + first;
#elif DD_LANES == 8
        return VecU64{0, 2, 1, 3} + first;
#else
        return VecU64{0, 1} + first;
#endif
    });
    words[1] = each_chain([&](int) { return at.sample - VecU64{}; });
    words[2] = each_chain([&](int) { return at.draw - VecU64{}; });
    words[3] = each_chain([&](int) { return at.stream - VecU64{}; });
    philox4x32_10(words, at.key0, at.key1);
    for (int i = 0; i < kChains; ++i) {
        radius[i] = interleave(words[0].chain[i], words[2].chain[i]);
        angle[i] = interleave(words[1].chain[i], words[3].chain[i]);
    }
}

// Stores v[0..3] to z[i], ..., z[i + 4 kLanes - 1], as far as these lie within z[0], ..., z[n - 1].
DD_INLINE void store_part(float* z, int64_t i, int64_t n, const Vec v[4]) {
    if (i >= 0 && i + 4 * kLanes <= n) {
        for (int j = 0; j < 4; ++j) store(z + i + j * kLanes, v[j]);
        return;
    }
    float values[4 * kLanes];
    for (int j = 0; j < 4; ++j) store(values + j * kLanes, v[j]);
    for (int64_t j = i < 0 ? -i : 0; j < 4 * kLanes && i + j < n; ++j) z[i + j] = values[j];
}

// Sets z[i] to the normal of the element first + i, for 0 <= i < n.
DD_INLINE void fill_normals(float* z, int64_t first, int64_t n, const NoiseCounter& at) {
    for (int64_t i = -(first % 4); i < n; i += kNoiseBlock) {
        VecU radius[kChains], angle[kChains];
        random_words((first + i) / 4, at, radius, angle);
        // All logarithms come before the square roots: the processor overlaps the iterations of a short loop.
        Vec squared_radius[kChains];
        for (int j = 0; j < kChains; ++j) squared_radius[j] = minus_two_log_uniform(radius[j]);
#pragma GCC unroll 2
        for (int j = 0; j < kChains; j += 2) {
            Vec v[4], cosine, sine;
            for (int k = 0; k < 2; ++k) {
                on_circle(squared_radius[j + k], angle[j + k], cosine, sine);
                zip(cosine, sine, v[2 * k], v[2 * k + 1]);
            }
            store_part(z, i + 2 * j * kLanes, n, v);
        }
    }
}

// Transposes rows [channels][pixels] to z [pixels][channels], one channel at a time so that few rows compete for the
// cache.
DD_INLINE void transpose(const float* rows, int64_t channels, int64_t pixels, float* z) {
    for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 8
        for (int64_t p = 0; p < pixels; ++p) z[p * channels + c] = rows[c * pixels + p];
    }
}

// Transposes rows of a number of channels that the compiler knows, so that it shuffles whole vectors.
template <int channels>
DD_INLINE void transpose(const float* rows, int64_t pixels, float* z) {
    for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < channels; ++c) z[p * channels + c] = rows[c * pixels + p];
    }
}

// Sets z to the noise of a tile in the order of memory, [pixels][channels]; the noise counts elements as
// [channels][pixels].
DD_INLINE void fill_noise(float* z, const Layout& layout, const Tile& tile, const NoiseCounter& at, float* scratch) {
    const int64_t channels = layout.channels, pixels = tile.pixels;
    if (channels == 1) return fill_normals(z, tile.first_pixel, pixels, at);
    for (int64_t c = 0; c < channels; ++c) {
        fill_normals(scratch + c * pixels, c * layout.pixels + tile.first_pixel, pixels, at);
    }
    if (channels == 3) return transpose<3>(scratch, pixels, z);
    if (channels == 4) return transpose<4>(scratch, pixels, z);
    transpose(scratch, channels, pixels, z);
}

}  // namespace dd::DD_ISA
