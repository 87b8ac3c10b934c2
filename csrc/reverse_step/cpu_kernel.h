#include "randn/cpu_noise.h"
#include "reverse_step/formula.h"

namespace dd::DD_ISA {

// Returns the model's output for a tile, after guidance: in place, or in `buffer`.
DD_INLINE const float* model_output(const ReverseStepArguments& a, const Tile& tile, float* buffer, float* scratch) {
    const float* out = read_tile(a.out, tile, buffer);
    if (!a.uncond) return out;
    const float* uncond = read_tile(a.uncond, tile, scratch);
    for_vectors(tile.elements, [&](int64_t i, int64_t left) {
        store(buffer + i, left, guide(load(out + i, left), load(uncond + i, left), a.guidance_scale));
    });
    return buffer;
}

// The noise that a step adds, scale * z; z is null where it adds none.
struct StepNoise {
    const float* z;
    float scale;
};

DD_INLINE StepNoise step_noise(const ReverseStepArguments& a, const Tile& tile, const StepRow& row, int64_t draw,
                               float* buffer, float* scratch) {
    if (row.sigma == 0.0f || !(a.noise || a.key)) return {nullptr, 0.0f};
    const float* z = buffer;
    if (a.noise) {
        z = read_tile(a.noise, tile, buffer);
    } else {
        fill_noise(buffer, a.layout, tile, load_key(a.key).counter(tile.sample, draw, kStreamReverseStep), scratch);
    }
    if (!a.variance) return {z, row.sigma};
    const float* variance = read_tile(a.variance, tile, scratch);
    for_vectors(tile.elements, [&](int64_t i, int64_t left) {
        store(buffer + i, left, load(z + i, left) * learned_sigma(load(variance + i, left), row));
    });
    return {buffer, 1.0f};
}

// x0 of earlier steps for a tile, and where this step's is kept.
struct StepHistory {
    const float *last, *older;
    float* kept;
};

// Steps a tile. Template arguments say what a call leaves out, so that the loop has no branch. The row is taken by
// value: the compiler would assume that a store to x_prev could change one behind a reference, and divide for every
// vector.
template <bool adds_noise, bool returns_x0, bool remembers>
void step_tile(const float* x, const float* out, const StepNoise noise, const StepHistory history, int64_t n,
               const StepRow row, const Clip clip, float* x_prev, float* x0) {
    for_vectors(n, [&](int64_t i, int64_t left) {
        Vec x_i = load(x + i, left), out_i = load(out + i, left);
        Vec x0_i = predict_x0(x_i, out_i, row, clip);
        Vec result = step_mean(x0_i, x_i, out_i, row);
        if (remembers) {
            if (row.prev_from_last != 0.0f) result = fma(load(history.last + i, left), row.prev_from_last, result);
            if (row.prev_from_older != 0.0f) result = fma(load(history.older + i, left), row.prev_from_older, result);
            store(history.kept + i, left, x0_i);
        }
        if (adds_noise) result = fma(load(noise.z + i, left), noise.scale, result);
        if (returns_x0) store(x0 + i, left, x0_i);
        store(x_prev + i, left, result);
    });
}

template <bool remembers>
auto chosen_step(bool adds_noise, bool returns_x0) {
    return adds_noise ? (returns_x0 ? step_tile<true, true, remembers> : step_tile<true, false, remembers>)
                      : (returns_x0 ? step_tile<false, true, remembers> : step_tile<false, false, remembers>);
}

// Steps a tile of a solver that keeps x0 of earlier steps. `buffers` are three that nothing else uses.
DD_INLINE void remembering_step(const ReverseStepArguments& a, const Tile& tile, int64_t step, const StepRow& row,
                                const Clip& clip, const float* x, const float* out, const StepNoise& noise,
                                float* x_prev, float* x0, float* const* buffers) {
    const History places = a.history(step);
    StepHistory history{nullptr, nullptr, output_tile(places.older, tile, buffers[2])};
    if (row.prev_from_last != 0.0f) history.last = read_tile(places.last, tile, buffers[0]);
    if (row.prev_from_older != 0.0f) history.older = read_tile(places.older, tile, buffers[1]);
    chosen_step<true>(noise.z, x0)(x, out, noise, history, tile.elements, row, clip, x_prev, x0);
    write_tile(places.older, tile, history.kept);
}

void reverse_step(const ReverseStepArguments& a, int64_t first_tile, int64_t last_tile, float* scratch) {
    const int64_t size = a.layout.tile_elements();
    const int count = a.even ? 9 : 6;
    float* buffers[9];
    for (int i = 0; i < count; ++i) buffers[i] = scratch + i * size;
    for (int64_t index = first_tile; index < last_tile; ++index) {
        Tile tile(a.layout, index);
        const int64_t step = a.step[tile.sample];
        const StepRow row = reinterpret_cast<const StepRow*>(a.rows)[step];
        const Clip clip = a.threshold ? Clip{a.threshold[tile.sample], true} : Clip{row.x0_clip, false};
        const float* x = read_tile(a.x, tile, buffers[0]);
        const float* out = model_output(a, tile, buffers[1], buffers[2]);
        const StepNoise noise = step_noise(a, tile, row, a.timesteps[step], buffers[3], buffers[2]);
        float* x_prev = output_tile(a.x_prev, tile, buffers[4]);
        float* x0 = a.x0 ? output_tile(a.x0, tile, buffers[5]) : nullptr;
        if (a.even) {
            remembering_step(a, tile, step, row, clip, x, out, noise, x_prev, x0, buffers + 6);
        } else {
            chosen_step<false>(noise.z, x0)(x, out, noise, {}, tile.elements, row, clip, x_prev, x0);
        }
        write_tile(a.x_prev, tile, x_prev);
        if (x0) write_tile(a.x0, tile, x0);
    }
}

}  // namespace dd::DD_ISA
