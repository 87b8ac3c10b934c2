#include "randn/cpu_noise.h"

namespace dd::DD_ISA {

void randn(const RandnArguments& a, int64_t first_tile, int64_t last_tile, float* scratch) {
    const NoiseKey key = load_key(a.key);
    float* buffer = scratch + a.layout.tile_elements();
    for (int64_t index = first_tile; index < last_tile; ++index) {
        Tile tile(a.layout, index);
        float* z = output_tile(a.z, tile, buffer);
        fill_noise(z, a.layout, tile, key.counter(tile.sample, key.draw, a.stream), scratch);
        write_tile(a.z, tile, z);
    }
}

}  // namespace dd::DD_ISA
