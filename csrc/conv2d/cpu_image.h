// Reads and writes pixels of an image of any of the three dtypes; the input passes its affine map and activation.

#include "common/activation.h"
#include "conv2d/arguments.h"

namespace dd::DD_ISA {

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

DD_INLINE void set_zero(float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, Vec{});
}

// to [columns][stride] = vectors of channels of pixels side by side, from `offset` on; a single vector may have `left`
// channels alone. Operations on the vectors of a pixel overlap.
template <class Activation, int vectors>
DD_INLINE void read_columns(const Operand& x, int64_t offset, int64_t channels, int64_t columns, int64_t left,
                            const Prologue& prologue, float* to, int64_t stride) {
    const bool affine = prologue.scale != nullptr;
    // A row of whole vectors is filled up with zeros, as every activation of 0 is 0; in others the next pixel follows.
    const int64_t stored = stride % kLanes == 0 ? kLanes : left;
    Vec scale[vectors]{}, shift[vectors]{};
    for (int v = 0; affine && v < vectors; ++v) {
        scale[v] = load(prologue.scale + v * kLanes, left);
        shift[v] = load(prologue.shift + v * kLanes, left);
    }
    for (int64_t i = 0; i < columns; ++i, offset += channels, to += stride) {
        Vec z[vectors];
        for (int v = 0; v < vectors; ++v) z[v] = read(x, offset + v * kLanes, left);
        for (int v = 0; affine && v < vectors; ++v) z[v] = fma(z[v], scale[v], shift[v]);
        activate<Activation>(z);
        for (int v = 0; v < vectors; ++v) store(to + v * kLanes, stored, z[v]);
    }
}

// The same of `count` channels, for a prologue and an offset that are those of the first one.
template <class Activation>
DD_INLINE void read_channels(const Operand& x, int64_t offset, int64_t channels, int64_t columns, int64_t count,
                             Prologue prologue, float* to, int64_t stride) {
    constexpr int together = 4;
    auto advance = [&](int64_t read) {
        offset += read;
        to += read;
        count -= read;
        if (prologue.scale != nullptr) prologue = {prologue.scale + read, prologue.shift + read, prologue.activation};
    };
    for (; count >= together * kLanes; advance(together * kLanes)) {
        read_columns<Activation, together>(x, offset, channels, columns, kLanes, prologue, to, stride);
    }
    for (; count >= kLanes; advance(kLanes)) {
        read_columns<Activation, 1>(x, offset, channels, columns, kLanes, prologue, to, stride);
    }
    if (count > 0) read_columns<Activation, 1>(x, offset, channels, columns, count, prologue, to, stride);
}

// Doubles a row: to [last - first][stride] are pixels [first, last), of which the last places hold those in memory.
// A pixel is never written after the place that it is read from.
DD_INLINE void double_columns(int64_t first, int64_t last, int64_t count, float* to, int64_t stride) {
    const int64_t start = last - 1 - (last - 1) / 2 - first;  // where the pixel in memory of number 0 would be
    for (int64_t i = first; i < last; ++i, to += stride) {
        const float* from = to + (start + i / 2 - (i - first)) * stride;
        for_vectors(count,
                    [&](int64_t c, int64_t left) DD_INLINE_LAMBDA { store(to + c, left, load(from + c, left)); });
    }
}

// to [columns][stride]: `count` channels from `channel` on of pixels [first, first + columns) of row y; zeros beyond
// the image.
static void read_row(const Operand& x, const conv2d::Shape& shape, int64_t sample, int64_t y, int64_t first,
                     int64_t columns, int64_t channel, int64_t count, const Prologue& prologue, float* to,
                     int64_t stride) {
    int64_t padded = round_up(count, kLanes), row = y < 0 || y >= shape.height ? 0 : shape.width;
    int64_t from = first < 0 ? -first : 0, until = row - first < columns ? row - first : columns;
    if (from > columns) from = columns;
    if (until < from) until = from;
    for (int64_t i = 0; i < from; ++i) set_zero(to + i * stride, padded);
    if (until > from) {
        const int half = shape.doubled ? 1 : 0;
        const int64_t start = (first + from) >> half, length = ((first + until - 1) >> half) + 1 - start;
        int64_t pixel = (y >> half) * (shape.width >> half) + start;
        int64_t offset = sample * x.sample_stride + pixel * shape.channels + channel;
        Prologue here = prologue;
        if (here.scale != nullptr) here = {here.scale + channel, here.shift + channel, here.activation};
        Activations::visit(prologue.activation, [&](auto activation) DD_INLINE_LAMBDA {
            read_channels<decltype(activation)>(x, offset, shape.channels, length, count, here,
                                                to + (until - length) * stride, stride);
        });
        const int64_t stored = stride % kLanes == 0 ? padded : count;
        if (shape.doubled) double_columns(first + from, first + until, stored, to + from * stride, stride);
    }
    for (int64_t i = until; i < columns; ++i) set_zero(to + i * stride, padded);
}

// Fetches what a pixel's outputs of one panel are written to later, and their residual: into the second-level cache,
// since too few lines may be on their way to the first one to hide memory's latency.
DD_INLINE void fetch_outputs(const conv2d::Forward& a, int64_t offset) {
    constexpr int64_t line = 64;
    const int64_t size = a.y.has_16_bits() ? 2 : 4, end = (offset + kPanel) * size;
    const char *y = static_cast<const char*>(a.y.data), *residual = static_cast<const char*>(a.residual.data);
    for (int64_t at = offset * size; at < end; at += line) {
        __builtin_prefetch(y + at, 1, 2);
        if (a.residual) __builtin_prefetch(residual + at, 0, 2);
    }
}

}  // namespace dd::DD_ISA
