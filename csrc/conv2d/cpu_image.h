// Reads and writes pixels of an image of any of the three dtypes; the input passes its affine map and activation.

#include "common/activation.h"
#include "conv2d/arguments.h"

namespace dd::DD_ISA {

DD_INLINE Vec read(const Operand& from, int64_t offset, int64_t left) {
    if (from.dtype == DType::float32) return load(static_cast<const float*>(from.data) + offset, left);
    VecU16 v = load(static_cast<const uint16_t*>(from.data) + offset, left);
    return from.dtype == DType::bfloat16 ? from_bfloat16(v) : from_float16(v);
}

DD_INLINE void write(const Operand& to, int64_t offset, int64_t left, Vec v) {
    if (to.dtype == DType::float32) {
        store(static_cast<float*>(to.data) + offset, left, v);
    } else {
        VecU16 narrow = to.dtype == DType::bfloat16 ? to_bfloat16(v) : to_float16(v);
        store(static_cast<uint16_t*>(to.data) + offset, left, narrow);
    }
}

// What the input passes before it is convolved: z -> act(scale z + shift), per sample and channel.
struct Prologue {
    const float *scale, *shift;  // of the sample, or null
    int activation;
};

DD_INLINE Prologue prologue_of(const conv2d::Forward& a, int64_t sample) {
    int64_t at = sample * a.shape.channels;
    bool affine = a.scale != nullptr;
    return {affine ? a.scale + at : nullptr, affine ? a.shift + at : nullptr, static_cast<int>(a.activation)};
}

// to [kLanes multiples] = `count` channels from `channel` on of the pixel at `offset`, and zeros up to a whole vector:
// every activation of 0 is 0.
DD_INLINE void read_pixel(const Operand& x, int64_t offset, int64_t channel, int64_t count, const Prologue& prologue,
                          float* to) {
    Activations::visit(prologue.activation, [&](auto activation) {
        for_vectors(count, [&](int64_t i, int64_t left) {
            Vec z[1] = {read(x, offset + channel + i, left)};
            if (prologue.scale != nullptr) {
                z[0] = fma(z[0], load(prologue.scale + channel + i, left), load(prologue.shift + channel + i, left));
            }
            activate<decltype(activation)>(z);
            store(to + i, z[0]);
        });
    });
}

DD_INLINE void set_zero(float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, Vec{});
}

// to [columns][stride]: pixels [first, first + columns) of row y; zeros beyond the image.
DD_INLINE void read_row(const Operand& x, const conv2d::Shape& shape, int64_t sample, int64_t y, int64_t first,
                        int64_t columns, int64_t channel, int64_t count, const Prologue& prologue, float* to,
                        int64_t stride) {
    int64_t padded = conv2d::round_up(count, kLanes);
    for (int64_t i = 0; i < columns; ++i, to += stride) {
        int64_t column = first + i;
        if (y < 0 || y >= shape.height || column < 0 || column >= shape.width) {
            set_zero(to, padded);
        } else {
            int64_t pixel = y * shape.width + column;
            read_pixel(x, sample * x.sample_stride + pixel * shape.channels, channel, count, prologue, to);
        }
    }
}

}  // namespace dd::DD_ISA
