// The regimes that group_norm_silu() in cuda.cu chooses from.
#pragma once

#include "group_norm_silu/cuda.h"

namespace dd::cuda {

void group_norm_silu_warp(const NormForward& arguments, cudaStream_t stream);
void group_norm_silu_resident(const NormForward& arguments, cudaStream_t stream);
// The largest cluster that the kernel of a resident plan runs in here.
int resident_largest_cluster(const NormShape& shape, const NormPlan& plan);
void group_norm_silu_split(const NormForward& arguments, cudaStream_t stream);

}  // namespace dd::cuda
