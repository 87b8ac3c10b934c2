// Sizes that kernels divide work by.
#pragma once

#include <cstdint>

namespace dd {

// Products that are summed in one chain of fused multiply-adds. The partial sums are then added up, so that a sum of
// 256 rounds like one of 64 + 4 terms.
constexpr int64_t kChunk = 64;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace dd
