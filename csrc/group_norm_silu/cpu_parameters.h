// The options of a call as floats, whatever their dtype: a few values, which the kernels read and write through here.
// Read after each_isa.h.
#pragma once

#include <memory>
#include <optional>

#include "group_norm_silu/arguments.h"
#include "group_norm_silu/options.h"

namespace dd::group_norm {

// Holds the address of a tensor's floats, or a buffer to convert them to; null if there is no tensor.
class Floats {
public:
    operator float*() const { return values; }

protected:
    explicit Floats(const MaybeTensor& x) {
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

// Converts the values on construction.
struct InputFloats : Floats {
    explicit InputFloats(const MaybeTensor& x) : Floats(x) {
        if (values != nullptr) baseline::read_tile(operand, all, values);
    }
};

// Writes the values back to the tensor on destruction.
struct OutputFloats : Floats {
    explicit OutputFloats(const MaybeTensor& x) : Floats(x) {}
    OutputFloats(const OutputFloats&) = delete;
    ~OutputFloats() {
        if (values != nullptr) baseline::write_tile(operand, all, values);
    }
};

// Owns the converted options that `options` points to.
struct OptionFloats {
    InputFloats weight, bias, pre_shift, scale, shift;
    Options options;

    explicit OptionFloats(const OptionTensors& o)
        : weight(o.weight),
          bias(o.bias),
          pre_shift(o.pre_shift),
          scale(o.scale),
          shift(o.shift),
          options{weight, bias, pre_shift, scale, shift, o.eps, static_cast<int>(o.activation)} {
        constexpr int64_t count = baseline::Activations::kCount;
        STD_TORCH_CHECK(o.activation >= 0 && o.activation < count, "dd_kernels: activation must be in [0, ", count,
                        "); got ", o.activation);
    }
};

}  // namespace dd::group_norm
