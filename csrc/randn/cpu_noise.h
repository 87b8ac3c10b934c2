// The normals of a stretch of elements, for every kernel that draws noise. Read once per instruction set.

#include "common/philox.h"
#include "randn/formula.h"

namespace dd::DD_ISA {

constexpr int kNoiseBlock = 4 * kLanes;

// Normals of kNoiseBlock elements, the first of them 4 * quad, in order.
DD_INLINE void normal_block(int64_t quad, const NoiseCounter& at, Vec z[4]) {
    // Lane i of the words is quad kOrder(i), chosen so that 4x4 transposes alone put the elements in order.
#if DD_LANES == 8
    VecU64 a[4] = {VecU64{0, 4, 1, 5} + static_cast<uint64_t>(quad)};
    VecU64 b[4] = {VecU64{2, 6, 3, 7} + static_cast<uint64_t>(quad)};
#else
    VecU64 a[4] = {VecU64{0, 2} + static_cast<uint64_t>(quad)};
    VecU64 b[4] = {VecU64{1, 3} + static_cast<uint64_t>(quad)};
#endif
    a[1] = b[1] = at.sample - VecU64{};
    a[2] = b[2] = at.draw - VecU64{};
    a[3] = b[3] = at.stream - VecU64{};
    philox4x32_10(a, at.key0, at.key1);
    philox4x32_10(b, at.key0, at.key1);
    VecU words[4];
    for (int i = 0; i < 4; ++i) words[i] = (VecU)((a[i] & 0xffffffffu) | (b[i] << 32));
    box_muller(words[0], words[1], z[0], z[1]);
    box_muller(words[2], words[3], z[2], z[3]);
    transpose_4x4(z);
}

// z[i] = the normal of element first + i, for i < n.
DD_INLINE void fill_normals(float* z, int64_t first, int64_t n, const NoiseCounter& at) {
    for (int64_t i = -(first % 4); i < n; i += kNoiseBlock) {
        Vec block[4];
        normal_block((first + i) / 4, at, block);
        if (i >= 0 && i + kNoiseBlock <= n) {
            for (int j = 0; j < 4; ++j) store(z + i + j * kLanes, block[j]);
            continue;
        }
        float values[kNoiseBlock];
        for (int j = 0; j < 4; ++j) store(values + j * kLanes, block[j]);
        for (int64_t j = i < 0 ? -i : 0; j < kNoiseBlock && i + j < n; ++j) z[i + j] = values[j];
    }
}

// The noise of a tile, in the order of memory ([pixels][channels]); elements count as [channels][pixels].
DD_INLINE void fill_noise(float* z, const Layout& layout, const Tile& tile, const NoiseCounter& at, float* scratch) {
    if (layout.channels == 1) return fill_normals(z, tile.first_pixel, tile.pixels, at);
    for (int64_t c = 0; c < layout.channels; ++c) {
        fill_normals(scratch, c * layout.pixels + tile.first_pixel, tile.pixels, at);
        for (int64_t p = 0; p < tile.pixels; ++p) z[p * layout.channels + c] = scratch[p];
    }
}

}  // namespace dd::DD_ISA
