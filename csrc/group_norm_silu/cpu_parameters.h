// The options of a call as floats, whatever their dtype: a few values, which the kernels read and write through here.
// Read after each_isa.h.
#pragma once

#include <memory>

#include "group_norm_silu/arguments.h"

namespace dd::group_norm {

// Holds the address of an operand's floats, or a buffer to convert them to; null if there is no operand.
class Floats {
public:
    operator float*() const { return values; }

protected:
    Floats(const Operand& x, int64_t count) : operand(x) {
        if (!x) return;
        all.elements = count;
        if (x.dtype != DType::float32) buffer.reset(new float[static_cast<size_t>(count)]);
        values = baseline::output_tile(x, all, buffer.get());
    }

    Operand operand;
    Run all{};
    std::unique_ptr<float[]> buffer;
    float* values = nullptr;
};

// Converts the values on construction.
struct InputFloats : Floats {
    InputFloats(const Operand& x, int64_t count) : Floats(x, count) {
        if (values != nullptr) baseline::read_tile(operand, all, values);
    }
};

// Writes the values back to the tensor on destruction.
struct OutputFloats : Floats {
    OutputFloats(const Operand& x, int64_t count) : Floats(x, count) {}
    OutputFloats(const OutputFloats&) = delete;
    ~OutputFloats() {
        if (values != nullptr) baseline::write_tile(operand, all, values);
    }
};

// Owns the converted options that `options` points to.
struct OptionFloats {
    InputFloats weight, bias, pre_shift, scale, shift;
    Options options;

    OptionFloats(const OptionOperands& o, const Shape& shape)
        : weight(o.weight, shape.channels),
          bias(o.bias, shape.channels),
          pre_shift(o.pre_shift, shape.samples * shape.channels),
          scale(o.scale, shape.samples * shape.channels),
          shift(o.shift, shape.samples * shape.channels),
          options{weight, bias, pre_shift, scale, this->shift, o.eps, o.activation} {}
};

}  // namespace dd::group_norm
