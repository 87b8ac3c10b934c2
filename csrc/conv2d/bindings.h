// From the tensors of conv2d's ops to the structs of its kernels, through the checks that keep them inside the tensors.
#pragma once

#include <algorithm>
#include <string>

#include "common/cpu.h"
#include "common/tensor_checks.h"
#include "common/workspace.h"
#include "conv2d/plan.h"

namespace dd::conv2d {

// The shape of a call. weight: [outputs, inputs, height, width], or, turned, [inputs, outputs, height, width].
inline Shape shape_of(const TensorChecks& checks, const Tensor& x, const Tensor& weight, bool turned, const Tensor& y,
                      int64_t stride, int64_t top, int64_t left, bool doubled = false) {
    checks.dimensions("x", x, 4);
    checks.dimensions("weight", weight, 4);
    checks.dimensions("y", y, 4);
    if (stride < 1) checks.fail("stride", "at least 1", std::to_string(stride));
    Shape shape{x.size(0), x.size(1),      x.size(2),      x.size(3), y.size(1), y.size(2),
                y.size(3), weight.size(2), weight.size(3), stride,    top,       left};
    if (doubled) {
        shape.doubled = true;
        shape.height *= 2;
        shape.width *= 2;
    }
    if (shape.channels == 0 || shape.taps() == 0) checks.fail("weight", "not empty", "an empty one");
    return shape;
}

// The strides of a weight that was checked; its memory is `values`.
inline Filters filters_of(const Operand& values, const Tensor& weight, bool turned) {
    int64_t second = weight.size(1), taps = weight.size(2) * weight.size(3);
    bool contiguous = weight.is_contiguous();
    Filters filters{values, second * taps, contiguous ? taps : 1, contiguous ? 1 : second, turned};
    if (turned) std::swap(filters.output_stride, filters.input_stride);
    return filters;
}

inline Method method_of(const TensorChecks& checks, int64_t number, const Shape& shape) {
    const Method method = static_cast<Method>(number);
    if (number < 0 || number > static_cast<int64_t>(Method::winograd4)) {
        checks.fail("method", "0 to 4", std::to_string(number));
    }
    bool winograd = method == Method::winograd2 || method == Method::winograd4;
    if (winograd && (shape.kernel_height != 3 || shape.kernel_width != 3 || shape.stride != 1)) {
        checks.fail("weight", "3 x 3, and the stride 1, for Winograd's methods", "another size or stride");
    }
    return method;
}

inline int64_t threads_of(const Shape& shape) {
    int64_t products = shape.taps() * shape.channels * shape.outputs;
    double pixels = static_cast<double>(shape.samples * shape.out_height * shape.out_width);
    return threads_for(static_cast<double>(products) * pixels);
}

}  // namespace dd::conv2d
