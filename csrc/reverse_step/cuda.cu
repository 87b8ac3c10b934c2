#include "reverse_step/cuda.h"

#include "common/cuda_unit.cuh"
#include "reverse_step/formula.h"

namespace dd::cuda {
namespace {

// The coefficients of one sample's step.
struct Step {
    StepRow row;
    Clip clip;
    int64_t draw;
    History history;
};

// Makes the coefficients NaN for a step outside the table: raising an error would mean to wait for the device.
DD_DEVICE Step load_step(const ReverseStepArguments& a, int64_t sample) {
    int64_t index = a.step[sample];
    Step step{{NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}, {NAN, false}, 0, {a.even, a.even}};
    if (index >= 0 && index < a.row_count) {
        step.row = reinterpret_cast<const StepRow*>(a.rows)[index];
        step.draw = a.timesteps[index];
        step.history = a.history(index);
        step.clip.limit = step.row.x0_clip;
        if (a.threshold) step.clip = {a.threshold[sample], true};
    }
    return step;
}

// Sets `out` to the model's output for a row, after guidance.
template <Order order>
DD_DEVICE void model_output(const ReverseStepArguments& a, int64_t sample, int64_t offset,
                            float out[unit_width(order)]) {
    constexpr int width = unit_width(order);
    const Row<order> conditional(a.out, sample, offset);
    if (!a.uncond) return conditional.floats(a.out.dtype, out);
    const Row<order> unconditional(a.uncond, sample, offset);
    float uncond[width];
    conditional.floats(a.out.dtype, out);
    unconditional.floats(a.uncond.dtype, uncond);
#pragma unroll
    for (int i = 0; i < width; ++i) out[i] = guide(out[i], uncond[i], a.guidance_scale);
}

// Multiplies z by the standard deviation, after loading it if the noise is given.
template <Order order>
DD_DEVICE void scale_noise(const ReverseStepArguments& a, int64_t sample, int64_t offset, const StepRow& row,
                           float z[unit_width(order)]) {
    constexpr int width = unit_width(order);
    if (a.noise) load_row<order>(a.noise, sample, offset, z);
    if (!a.variance) {
#pragma unroll
        for (int i = 0; i < width; ++i) z[i] *= row.sigma;
        return;
    }
    float variance[width];
    load_row<order>(a.variance, sample, offset, variance);
#pragma unroll
    for (int i = 0; i < width; ++i) z[i] *= learned_sigma(variance[i], row);
}

// Adds the terms of x0 of earlier steps to x_prev, and keeps this step's.
template <Order order>
DD_DEVICE void remember(const Step& step, int64_t sample, int64_t offset, const float x0[unit_width(order)],
                        float x_prev[unit_width(order)]) {
    constexpr int width = unit_width(order);
    const auto add = [&](const Operand& earlier, float coefficient) {
        if (coefficient == 0.0f) return;
        float value[width];
        load_row<order>(earlier, sample, offset, value);
#pragma unroll
        for (int i = 0; i < width; ++i) x_prev[i] = fma(value[i], coefficient, x_prev[i]);
    };
    add(step.history.last, step.row.prev_from_last);
    add(step.history.older, step.row.prev_from_older);
    store_row<order>(step.history.older, sample, offset, x0);
}

template <Order order, bool remembers>
DD_DEVICE void step_unit(const ReverseStepArguments& a, int64_t sample, const Unit<order>& unit, const Step& step) {
    constexpr int width = unit_width(order);
    const bool noisy = step.row.sigma != 0.0f && (a.noise || a.key);
    float z[unit.kRows][width] = {};
    if (noisy && !a.noise) unit.normals(load_key(a.key).counter(sample, step.draw, kStreamReverseStep), z);
#pragma unroll
    for (int row = 0; row < unit.kRows; ++row) {
        const int64_t offset = unit.offset(row);
        const Row<order> x_row(a.x, sample, offset);
        float x[width], out[width], x0[width];
        model_output<order>(a, sample, offset, out);
        x_row.floats(a.x.dtype, x);
        if (noisy) scale_noise<order>(a, sample, offset, step.row, z[row]);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            x0[i] = predict_x0(x[i], out[i], step.row, step.clip);
            x[i] = step_mean(x0[i], x[i], out[i], step.row);
        }
        if constexpr (remembers) remember<order>(step, sample, offset, x0, x);
#pragma unroll
        for (int i = 0; i < width; ++i) x[i] = noisy ? x[i] + z[row][i] : x[i];
        store_row<order>(a.x_prev, sample, offset, x);
        if (a.x0) store_row<order>(a.x0, sample, offset, x0);
    }
}

// Blocks per multiprocessor that the compiler plans registers for: 80 per thread, where 64 would spill. A kernel that
// remembers holds the places of earlier x0 too, and would spill with the registers of one that does not.
DD_HOST_DEVICE constexpr int blocks_for(Order order, bool remembers) {
    if (order == Order::contiguous || order == Order::paired) return remembers ? 4 : 6;
    return remembers && unit_rows(order) > 1 ? 2 : unit_blocks(order);
}

template <Order order, bool remembers>
__global__ void __launch_bounds__(kUnitThreads, blocks_for(order, remembers))
    reverse_step_kernel(const ReverseStepArguments a) {
    for (int64_t sample = blockIdx.y; sample < a.layout.samples; sample += gridDim.y) {
        const Step step = load_step(a, sample);
        for (Unit<order> unit(a.layout); unit.exists(); unit.next()) step_unit<order, remembers>(a, sample, unit, step);
    }
}

}  // namespace

void reverse_step(const ReverseStepArguments& arguments, cudaStream_t stream) {
    const auto& a = arguments;
    const std::initializer_list<Operand> operands = {a.x,      a.out, a.variance, a.uncond, a.noise,
                                                     a.x_prev, a.x0,  a.even,     a.odd};
    for_units(a.layout, operands, [&](auto order, const Grid& grid) {
        constexpr Order of = decltype(order)::value;
        auto kernel = a.even ? reverse_step_kernel<of, true> : reverse_step_kernel<of, false>;
        launch("reverse_step", kernel, grid, stream, a);
    });
}

}  // namespace dd::cuda
