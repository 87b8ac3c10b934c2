// Chooses the algorithm of a convolution, and divides its work, by a model of the cost: of shape, threads and
// instruction set alone, so that the same call always takes the same path.
#pragma once

#include "conv2d/arguments.h"

namespace dd::conv2d {

// The plan of a method that serves the shape.
Plan plan_of(const Shape& shape, Method method, const Target& target);

// The plan of a weight gradient by Winograd's F(4 x 4), or F(2 x 2) where that is asked for or takes fewer products.
Plan gradient_plan(const Shape& shape, Method method, const Target& target);

// The method itself if it names one, else the one of least modelled cost.
Method choose(const Shape& shape, Method method, const Target& target);

// Into how many parts packing a block's input is divided.
inline int64_t packing_parts(const Shape& shape, const Plan& plan) {
    return plan.input_parts * (plan.method == Method::direct ? 1 : divide_up(shape.channels, kChunk));
}

// Floats of workspace: of the packed input, which all threads share, and of a thread that packs it.
int64_t packed_size(const Plan& plan);
int64_t input_scratch(const Shape& shape, const Plan& plan);

}  // namespace dd::conv2d
