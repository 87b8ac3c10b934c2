#include "q_sample/cuda.h"

#include "common/cuda_unit.cuh"
#include "q_sample/formula.h"

namespace dd::cuda {
namespace {

DD_DEVICE Marginal load_marginal(const QSampleArguments& a, int64_t sample) {
    int64_t t = a.t[sample];
    if (t < 0 || t >= a.row_count) return {NAN, NAN};
    return reinterpret_cast<const Marginal*>(a.rows)[t];
}

template <Order order>
DD_DEVICE void diffuse_unit(const QSampleArguments& a, int64_t sample, const Unit<order>& unit,
                            const Marginal& marginal) {
    float z[unit.kRows][unit.kWidth] = {};
    if (!a.noise) {
        const NoiseKey key = load_key(a.key);
        unit.normals(key.counter(sample, key.draw, kStreamQSample), z);
    }
#pragma unroll
    for (int row = 0; row < unit.kRows; ++row) {
        const int64_t offset = unit.offset(row);
        float x[unit.kWidth];
        load_row<order>(a.x_start, sample, offset, x);
        if (a.noise) load_row<order>(a.noise, sample, offset, z[row]);
#pragma unroll
        for (int i = 0; i < unit.kWidth; ++i) x[i] = diffuse(x[i], z[row][i], marginal);
        store_row<order>(a.x_t, sample, offset, x);
        if (a.noise_out) store_row<order>(a.noise_out, sample, offset, z[row]);
    }
}

template <Order order>
__global__ void __launch_bounds__(kUnitThreads, unit_blocks(order)) q_sample_kernel(const QSampleArguments a) {
    for (int64_t sample = blockIdx.y; sample < a.layout.samples; sample += gridDim.y) {
        const Marginal marginal = load_marginal(a, sample);
        for (Unit<order> unit(a.layout); unit.exists(); unit.next()) diffuse_unit(a, sample, unit, marginal);
    }
}

}  // namespace

void q_sample(const QSampleArguments& arguments, cudaStream_t stream) {
    const auto& a = arguments;
    for_units(a.layout, {a.x_start, a.noise, a.x_t, a.noise_out}, [&](auto order, const Grid& grid) {
        launch("q_sample", q_sample_kernel<decltype(order)::value>, grid, stream, a);
    });
}

}  // namespace dd::cuda
