#include "group_norm_silu/cuda.h"

#include "group_norm_silu/cuda_regimes.h"

namespace dd::cuda {

NormPlan plan_forward(const NormShape& shape) {
    auto largest_cluster = [&](const NormPlan& plan) { return resident_largest_cluster(shape, plan); };
    return plan_to_run(shape, Direction::forward, current_chip(), largest_cluster);
}

void group_norm_silu(const NormForward& arguments, cudaStream_t stream) {
    switch (arguments.plan.regime) {
        case Regime::warp:
            return group_norm_silu_warp(arguments, stream);
        case Regime::resident:
            return group_norm_silu_resident(arguments, stream);
        case Regime::split:
            return group_norm_silu_split(arguments, stream);
    }
}

}  // namespace dd::cuda
