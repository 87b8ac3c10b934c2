// Waves of split tiles, forward and backward. Two passes read a tile, the second from the L2 cache: it follows the
// first at once, for as many tiles (a wave) as fit there.
#pragma once

#include "group_norm_silu/cuda_position.cuh"

namespace dd::cuda {

template <DType dtype, Access access, class Arguments>
DD_DEVICE Position<dtype, access> split_position(const Arguments& a) {
    const unsigned splits = static_cast<unsigned>(a.plan.splits);
    return {a.shape, a.plan, static_cast<unsigned>(a.first_tile) + blockIdx.x / splits,
            static_cast<int>(blockIdx.x % splits)};
}

// Calls passes(a, tiles, dtype, access) for each wave of at most wave_tiles tiles from a.first_tile on; dtype and
// access are std::integral_constants.
template <class Arguments, class Passes>
void for_waves(Arguments a, int64_t wave_tiles, const Passes& passes) {
    auto run = [&](auto dtype, auto access) {
        for (a.first_tile = 0; a.first_tile < a.plan.tiles; a.first_tile += wave_tiles) {
            passes(a, std::min(wave_tiles, a.plan.tiles - a.first_tile), dtype, access);
        }
    };
    for_dtype(a.shape.dtype, [&](auto dtype) {
        switch (a.plan.access) {
            case Access::contiguous:
                return run(dtype, std::integral_constant<Access, Access::contiguous>{});
            case Access::channels_last:
                return run(dtype, std::integral_constant<Access, Access::channels_last>{});
            case Access::scalar:
                return run(dtype, std::integral_constant<Access, Access::scalar>{});
        }
    });
}

}  // namespace dd::cuda
