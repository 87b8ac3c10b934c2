// Chooses and launches the register-resident kernels, forward and backward. A tile is in the registers of plan.cluster
// blocks, which are one cluster.
//
// Kernels, the parameter of the functions on the host, has
//     kName               the op's name in errors
//     shared_bytes(shape, plan)
//     holding<dtype, access, rare>(resident), the kernel whose threads hold that many vectors
#pragma once

#include "common/cuda_chip.h"
#include "group_norm_silu/cuda_position.cuh"

namespace dd::cuda {

// Returns the position of this thread's block: block is blockIdx.x, behind an optimisation barrier or not.
template <DType dtype, Access access, class Arguments>
DD_DEVICE Position<dtype, access> resident_position(const Arguments& a, unsigned block) {
    const unsigned cluster = static_cast<unsigned>(a.plan.cluster);
    return {a.shape, a.plan, block / cluster, static_cast<int>(blockIdx.x % cluster)};
}

template <class Kernels>
auto resident_kernel_for(const NormShape& shape, const NormPlan& plan, int activation) {
    return for_activation(activation, [&](auto rare) {
        return for_dtype(shape.dtype, [&](auto dtype) {
            return plan.access == Access::contiguous
                       ? Kernels::template holding<dtype.value, Access::contiguous, rare.value>(plan.resident)
                       : Kernels::template holding<dtype.value, Access::channels_last, rare.value>(plan.resident);
        });
    });
}

template <class Kernels>
int largest_cluster_of(const NormShape& shape, const NormPlan& plan) {
    const auto kernel = resident_kernel_for<Kernels>(shape, plan, kNone);
    return largest_cluster(reinterpret_cast<const void*>(kernel), kNormThreads);
}

template <class Kernels, class Arguments>
void launch_resident(const Arguments& a, cudaStream_t stream) {
    const int64_t blocks = a.plan.tiles * a.plan.cluster;
    const Grid grid{blocks, 1, kNormThreads, Kernels::shared_bytes(a.shape, a.plan), a.plan.cluster};
    launch(Kernels::kName, resident_kernel_for<Kernels>(a.shape, a.plan, a.options.activation), grid, stream, a);
}

}  // namespace dd::cuda
