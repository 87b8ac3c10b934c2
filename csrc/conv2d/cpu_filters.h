// Reads weights of any of four layouts (contiguous or channels_last, as they are or turned for the input's gradient)
// as vectors of kLanes outputs, and writes them back in the first two.

#include "common/vec_transpose.h"
#include "conv2d/arguments.h"

namespace dd::DD_ISA {

// to [inputs][taps][kLanes]: the filters of `count` outputs, of some inputs, of which read_at(offset, left) gives
// values that lie side by side.
template <class ReadAt>
DD_INLINE void read_filters_by(ReadAt read_at, const conv2d::Filters& filters, int64_t taps, int64_t count,
                               int64_t inputs, float* to) {
    auto read_outputs = [&](int64_t offset, int64_t length, float* rows, int64_t to_stride) DD_INLINE_LAMBDA {
        auto read_later = [&](int64_t i, int64_t left) DD_INLINE_LAMBDA { return read_at(offset + i, left); };
        read_transposed(read_later, filters.output_stride, count, length, rows, to_stride);
    };
    if (filters.output_stride == 1) {
        for (int64_t i = 0; i < inputs * taps; ++i) {
            store(to + i * kLanes, read_at(i / taps * filters.input_stride + i % taps * filters.tap_stride, count));
        }
    } else if (filters.tap_stride == 1 && filters.input_stride == taps) {
        read_outputs(0, inputs * taps, to, kLanes);
    } else if (filters.tap_stride == 1) {
        for (int64_t i = 0; i < inputs; ++i) {
            read_outputs(i * filters.input_stride, taps, to + i * taps * kLanes, kLanes);
        }
    } else {
        for (int64_t tap = 0; tap < taps; ++tap) {
            read_outputs(tap * filters.tap_stride, inputs, to + tap * kLanes, taps * kLanes);
        }
    }
}

// The same from `output` and `input` on, of any of the three dtypes.
DD_INLINE void read_filters(const conv2d::Filters& filters, int64_t taps, int64_t output, int64_t count, int64_t input,
                            int64_t inputs, float* to) {
    const int64_t first = output * filters.output_stride + input * filters.input_stride;
    if (filters.values.dtype == DType::float32) {
        const float* from = static_cast<const float*>(filters.values.data) + first;
        auto load_at = [&](int64_t offset, int64_t left) DD_INLINE_LAMBDA { return load(from + offset, left); };
        read_filters_by(load_at, filters, taps, count, inputs, to);
    } else {
        auto widen_at = [&](int64_t i, int64_t left) DD_INLINE_LAMBDA { return read(filters.values, first + i, left); };
        read_filters_by(widen_at, filters, taps, count, inputs, to);
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
