#include "randn/cuda.h"

#include "common/cuda_unit.cuh"

namespace dd::cuda {
namespace {

template <Order order>
__global__ void __launch_bounds__(kUnitThreads, unit_blocks(order)) randn_kernel(const RandnArguments a) {
    const NoiseKey key = load_key(a.key);
    for (int64_t sample = blockIdx.y; sample < a.layout.samples; sample += gridDim.y) {
        for (Unit<order> unit(a.layout); unit.exists(); unit.next()) {
            float z[unit.kRows][unit.kWidth];
            unit.normals(key.counter(sample, key.draw, a.stream), z);
#pragma unroll
            for (int row = 0; row < unit.kRows; ++row) store_row<order>(a.z, sample, unit.offset(row), z[row]);
        }
    }
}

}  // namespace

void randn(const RandnArguments& arguments, cudaStream_t stream) {
    for_units(arguments.layout, {arguments.z}, [&](auto order, const Grid& grid) {
        launch("randn", randn_kernel<decltype(order)::value>, grid, stream, arguments);
    });
}

}  // namespace dd::cuda
