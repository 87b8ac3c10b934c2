// Reads weights of any of four layouts (contiguous or channels_last, as they are or turned for the input's gradient)
// as vectors of kLanes outputs, and writes them back in the first two.

#include "common/vec_transpose.h"
#include "conv2d/arguments.h"

namespace dd::DD_ISA {

// to [inputs][taps][kLanes]: the filters of `count` outputs from `output` on, of some inputs.
DD_INLINE void read_filters(const conv2d::Filters& filters, int64_t taps, int64_t output, int64_t count, int64_t input,
                            int64_t inputs, float* to) {
    const int64_t first = output * filters.output_stride + input * filters.input_stride;
    // to[i * to_stride] = the i-th values from `offset` on of each output.
    auto read_outputs = [&](int64_t offset, int64_t length, float* rows, int64_t to_stride) DD_INLINE_LAMBDA {
        read_transposed(filters.values, first + offset, filters.output_stride, count, length, rows, to_stride);
    };
    if (filters.output_stride == 1) {
        for (int64_t i = 0; i < inputs * taps; ++i) {
            const int64_t offset = i / taps * filters.input_stride + i % taps * filters.tap_stride;
            store(to + i * kLanes, read(filters.values, first + offset, count));
        }
    } else if (filters.tap_stride == 1 && filters.input_stride == taps) {
        read_outputs(0, inputs * taps, to, kLanes);
    } else if (filters.tap_stride == 1) {
        for (int64_t i = 0; i < inputs; ++i)
            read_outputs(i * filters.input_stride, taps, to + i * taps * kLanes, kLanes);
    } else {
        for (int64_t tap = 0; tap < taps; ++tap) {
            read_outputs(tap * filters.tap_stride, inputs, to + tap * kLanes, taps * kLanes);
        }
    }
}

// The opposite, for filters of float32 that are not turned.
DD_INLINE void write_filters(const conv2d::Filters& filters, int64_t taps, int64_t output, int64_t count, int64_t input,
                             int64_t inputs, const float* from, bool accumulate) {
    float* to =
        static_cast<float*>(filters.values.data) + output * filters.output_stride + input * filters.input_stride;
    if (filters.tap_stride == 1) {
        write_transposed(from, kLanes, count, inputs * taps, to, filters.output_stride, accumulate);
        return;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
        write_transposed(from + tap * kLanes, taps * kLanes, count, inputs, to + tap * filters.tap_stride,
                         filters.output_stride, accumulate);
    }
}

}  // namespace dd::DD_ISA
