// Direct convolution of any kernel size and stride: each output pixel is a packed row of all taps and channels.
//
// The depth is ordered by chunks of channels, within a chunk by taps, within a tap by channels; each chunk is padded to
// whole vectors.

#include "conv2d/arguments.h"

namespace dd::DD_ISA {

// Whether an output pixel's packed row would be an input pixel: of 1 x 1 filters of stride 1 with nothing around.
DD_INLINE bool rows_are_pixels(const conv2d::Forward& a) {
    const conv2d::Shape& shape = a.shape;
    return a.plan.method == conv2d::Method::direct && shape.taps() == 1 && shape.stride == 1 && !shape.doubled &&
           shape.top == 0 && shape.left == 0 && shape.out_height == shape.height && shape.out_width == shape.width;
}

// Whether the micro-kernel reads the rows where they lie, so that none is packed.
DD_INLINE bool multiplies_pixels(const conv2d::Forward& a) {
    return kPackedFloat32 && rows_are_pixels(a) && a.x.dtype == DType::float32 && a.scale == nullptr &&
           a.activation == 0 && a.shape.channels % kLanes == 0;
}

// Packs pixels [first, last) of a block whose rows they are. Images lie dense, so that a pixel is found by its number.
template <class Activation>
DD_INLINE void pack_pixels(const conv2d::Forward& a, const conv2d::Block& block, int64_t first, int64_t last,
                           Packed* packed) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width, rows = a.plan.rows;
    for (int64_t pixel = first; pixel < last; ++pixel) {
        const int64_t index = block.first + pixel;
        const Prologue prologue = prologue_of(a, a.scale == nullptr ? 0 : index / pixels);
        Packed* to = packed + pixel / rows * a.plan.depth * rows + pixel % rows * kLanes;
        for_vectors(channels, [&](int64_t i, int64_t left) DD_INLINE_LAMBDA {
            Vec z[1] = {read(a.x, index * channels + i, left)};
            if (prologue.scale != nullptr)
                z[0] = fma(z[0], load(prologue.scale + i, left), load(prologue.shift + i, left));
            activate<Activation>(z);
            put_row(to + i * rows, z[0]);
        });
    }
}

// Packs output pixels [first, last) of a block. scratch holds one row of a chunk.
DD_INLINE void pack_direct_input(const conv2d::Forward& a, const conv2d::Block& block, int64_t first, int64_t last,
                                 float* scratch, Packed* packed) {
    const conv2d::Shape& shape = a.shape;
    const conv2d::Plan& plan = a.plan;
    if (multiplies_pixels(a)) return;
    if (rows_are_pixels(a)) {
        Activations::visit(static_cast<int>(a.activation), [&](auto activation) DD_INLINE_LAMBDA {
            pack_pixels<decltype(activation)>(a, block, first, last, packed);
        });
        return;
    }
    for (int64_t pixel = first; pixel < last; ++pixel) {
        int64_t index = block.first + pixel, out_pixels = shape.out_height * shape.out_width;
        int64_t sample = index / out_pixels, in_sample = index % out_pixels;
        int64_t y = in_sample / shape.out_width * shape.stride - shape.top;
        int64_t x = in_sample % shape.out_width * shape.stride - shape.left;
        Prologue prologue = prologue_of(a, sample);
        Packed* to = packed + pixel / plan.rows * plan.depth * plan.rows + pixel % plan.rows * kLanes;
        for (int64_t channel = 0; channel < shape.channels; channel += kChunk) {
            int64_t left = shape.channels - channel, count = left < kChunk ? left : kChunk;
            // A pixel is read up to a whole vector: the next tap, or the padding, overwrites what is beyond.
            for (int64_t ky = 0; ky < shape.kernel_height; ++ky) {
                read_row(a.x, shape, sample, y + ky, x, shape.kernel_width, channel, count, prologue,
                         scratch + ky * shape.kernel_width * count, count);
            }
            int64_t length = shape.taps() * count, padded = round_up(length, kLanes);
            for (int64_t i = length; i < padded; ++i) scratch[i] = 0;
            for (int64_t i = 0; i < padded; i += kLanes, to += plan.rows * kLanes) put_row(to, load(scratch + i));
        }
    }
}

// Packs the filters of a panel, of input channels [first, first + count): to [round_up(taps count)][kPanel].
DD_INLINE void pack_direct_filters(const conv2d::Forward& a, int64_t panel, int64_t first, int64_t count,
                                   float* scratch, Packed* to) {
    int64_t taps = a.shape.taps(), length = taps * count, padded = round_up(length, kLanes);
    for (int v = 0; v < 2; ++v) {
        int64_t output = panel * kPanel + v * kLanes, outputs = a.shape.outputs - output;
        if (outputs <= 0) break;
        for (int64_t c = 0; c < count; c += kLanes) {
            int64_t inputs = count - c < kLanes ? count - c : kLanes;
            read_filters(a.filters, taps, output, outputs < kLanes ? outputs : kLanes, first + c, inputs, scratch);
            for (int64_t i = 0; i < inputs; ++i) {
                for (int64_t tap = 0; tap < taps; ++tap) {
                    int64_t source = i * taps + (a.filters.turned ? taps - 1 - tap : tap);
                    put_columns(to, tap * count + c + i, v * kLanes, load(scratch + source * kLanes));
                }
            }
        }
        for (int64_t i = length; i < padded; ++i) put_columns(to, i, v * kLanes, Vec{});
    }
}

// Writes one output pixel of a panel. products: [kPanel]. Images lie dense, so that a pixel is found by its number.
DD_INLINE void write_direct_pixel(const conv2d::Forward& a, int64_t index, int64_t panel, const float* products) {
    for (int v = 0; v < 2; ++v) {
        int64_t output = panel * kPanel + v * kLanes, left = a.shape.outputs - output;
        if (left <= 0) break;
        int64_t at = index * a.shape.outputs + output;
        Vec value = load(products + v * kLanes);
        if (a.bias != nullptr) value += load(a.bias + output, left);
        if (a.residual) value += read(a.residual, at, left);
        write(a.y, at, left, value);
    }
}

}  // namespace dd::DD_ISA
