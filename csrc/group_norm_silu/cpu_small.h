// Weights, biases, shifts and scales: a few values, which the kernels read and write as floats whatever
// their dtype. Read after each_isa.h.
#pragma once

#include <memory>
#include <optional>

#include "common/tensors.h"

namespace dd::group_norm {

// Where a tensor has its floats, or a buffer to widen them to; null if there is no tensor.
class Floats {
public:
    operator float*() const { return values; }

protected:
    explicit Floats(const std::optional<Tensor>& x) {
        if (!x.has_value()) return;
        operand = dd::operand(*x);
        all.elements = x->numel();
        if (operand.dtype != DType::float32) buffer.reset(new float[static_cast<size_t>(all.elements)]);
        values = baseline::output_tile(operand, all, buffer.get());
    }

    Operand operand;
    Run all{};
    std::unique_ptr<float[]> buffer;
    float* values = nullptr;
};

struct InputFloats : Floats {
    explicit InputFloats(const std::optional<Tensor>& x) : Floats(x) {
        if (values != nullptr) baseline::read_tile(operand, all, values);
    }
};

// Go home when they go out of scope.
struct OutputFloats : Floats {
    explicit OutputFloats(const std::optional<Tensor>& x) : Floats(x) {}
    OutputFloats(const OutputFloats&) = delete;
    ~OutputFloats() {
        if (values != nullptr) baseline::write_tile(operand, all, values);
    }
};

}  // namespace dd::group_norm
