#include "randn/cpu_noise.h"
#include "reverse_step/formula.h"

namespace dd::DD_ISA {

// out of a tile, guided; in `buffer` where it is not in place already.
DD_INLINE const float* model_output(const ReverseStepArguments& a, const Tile& tile, float* buffer, float* scratch) {
    const float* out = read_tile(a.out, tile, buffer);
    if (!a.uncond) return out;
    const float* uncond = read_tile(a.uncond, tile, scratch);
    for (int64_t i = 0; i < tile.elements; i += kLanes) {
        int64_t left = tile.elements - i;
        store(buffer + i, left, guide(load(out + i, left), load(uncond + i, left), a.guidance_scale));
    }
    return buffer;
}

// z of a tile, scaled where the model learned its variance; null where the step adds no noise.
DD_INLINE const float* step_noise(const ReverseStepArguments& a, const Tile& tile, const StepRow& row, int64_t draw,
                                  float* buffer, float* scratch) {
    if (row.sigma == 0.0f || !(a.noise || a.draws_noise)) return nullptr;
    const float* z = buffer;
    if (a.noise) {
        z = read_tile(a.noise, tile, buffer);
    } else {
        fill_noise(buffer, a.layout, tile, a.key.counter(tile.sample, draw, kStreamReverseStep), scratch);
    }
    if (!a.variance) return z;
    const float* variance = read_tile(a.variance, tile, scratch);
    for (int64_t i = 0; i < tile.elements; i += kLanes) {
        int64_t left = tile.elements - i;
        store(buffer + i, left, load(z + i, left) * learned_sigma(load(variance + i, left), row));
    }
    return buffer;
}

// x_prev = mean + noise_scale noise.
DD_INLINE void step_tile(const float* x, const float* out, const float* noise, float noise_scale, int64_t n,
                         const StepRow& row, const Clip& clip, float* x_prev, float* x0) {
    for (int64_t i = 0; i < n; i += kLanes) {
        int64_t left = n - i;
        Vec x_i = load(x + i, left), out_i = load(out + i, left);
        Vec x0_i = predict_x0(x_i, out_i, row, clip);
        Vec mean = step_mean(x0_i, x_i, out_i, row);
        if (x0) store(x0 + i, left, x0_i);
        store(x_prev + i, left, noise ? fma(load(noise + i, left), noise_scale, mean) : mean);
    }
}

void reverse_step(const ReverseStepArguments& a, int64_t first_tile, int64_t last_tile, float* scratch) {
    const int64_t size = a.layout.tile_elements();
    float* buffers[6];
    for (int i = 0; i < 6; ++i) buffers[i] = scratch + i * size;
    for (int64_t index = first_tile; index < last_tile; ++index) {
        Tile tile(a.layout, index);
        const int64_t step = a.step[tile.sample * a.step_stride];
        const StepRow row = reinterpret_cast<const StepRow*>(a.rows)[step];
        const Clip clip = a.threshold ? Clip{a.threshold[tile.sample], true} : Clip{row.x0_clip, false};
        const float* x = read_tile(a.x, tile, buffers[0]);
        const float* out = model_output(a, tile, buffers[1], buffers[2]);
        const float* noise = step_noise(a, tile, row, a.timesteps[step], buffers[3], buffers[2]);
        float* x_prev = output_tile(a.x_prev, tile, buffers[4]);
        float* x0 = a.x0 ? output_tile(a.x0, tile, buffers[5]) : nullptr;
        step_tile(x, out, noise, a.variance ? 1.0f : row.sigma, tile.elements, row, clip, x_prev, x0);
        write_tile(a.x_prev, tile, x_prev);
        if (x0) write_tile(a.x0, tile, x0);
    }
}

}  // namespace dd::DD_ISA
