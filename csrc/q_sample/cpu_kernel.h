#include "q_sample/formula.h"
#include "randn/cpu_noise.h"

namespace dd::DD_ISA {

void q_sample(const QSampleArguments& a, int64_t first_tile, int64_t last_tile, float* scratch) {
    const int64_t size = a.layout.tile_elements();
    const NoiseKey key = a.key ? load_key(a.key) : NoiseKey{};
    float *x_buffer = scratch, *z_buffer = scratch + size, *out_buffer = scratch + 2 * size;
    for (int64_t index = first_tile; index < last_tile; ++index) {
        Tile tile(a.layout, index);
        const Marginal row = reinterpret_cast<const Marginal*>(a.rows)[a.t[tile.sample]];
        const float* x_start = read_tile(a.x_start, tile, x_buffer);
        const float* z = z_buffer;
        if (a.noise) {
            z = read_tile(a.noise, tile, z_buffer);
        } else {
            fill_noise(z_buffer, a.layout, tile, key.counter(tile.sample, key.draw, kStreamQSample), out_buffer);
        }
        float* x_t = output_tile(a.x_t, tile, out_buffer);
        for_vectors(tile.elements, [&](int64_t i, int64_t left) {
            store(x_t + i, left, diffuse(load(x_start + i, left), load(z + i, left), row));
        });
        write_tile(a.x_t, tile, x_t);
        if (a.noise_out) write_tile(a.noise_out, tile, z);
    }
}

}  // namespace dd::DD_ISA
