// What the kernels know of their tensors: no torch type passes beyond the bindings.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dd {

enum class DType { float32, bfloat16, float16 };

// A tensor whose samples are dense, all in the same order, and sample_stride elements apart.
struct Operand {
    void* data = nullptr;
    int64_t sample_stride = 0;
    DType dtype = DType::float32;

    DD_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// A sample lies in memory as [pixels][channels]. A contiguous tensor is one channel of many pixels.
struct Layout {
    int64_t samples, pixels, channels;
    int64_t tile_pixels;

    int64_t tiles_per_sample() const { return (pixels + tile_pixels - 1) / tile_pixels; }
    int64_t tiles() const { return samples * tiles_per_sample(); }
    int64_t tile_elements() const { return tile_pixels * channels; }
};

// Elements of one sample that lie dense in memory.
struct Run {
    int64_t sample, offset, elements;  // the offset is within the sample
};

// What a kernel works on at a time: all channels of some pixels, a dense run that stays in the L1 cache.
struct Tile : Run {
    int64_t first_pixel, pixels;

    Tile(const Layout& layout, int64_t index) {
        sample = index / layout.tiles_per_sample();
        first_pixel = index % layout.tiles_per_sample() * layout.tile_pixels;
        int64_t left = layout.pixels - first_pixel;
        pixels = left < layout.tile_pixels ? left : layout.tile_pixels;
        offset = first_pixel * layout.channels;
        elements = pixels * layout.channels;
    }
};

// Where in all noise a sample's values are: Philox's key and the counter but for the quad.
struct NoiseCounter {
    uint32_t key0, key1, sample, draw, stream;
};

// (seed, first_sample, draw) as the ops receive it.
struct NoiseKey {
    int64_t seed, first_sample, draw;

    DD_HOST_DEVICE NoiseCounter counter(int64_t sample, int64_t draw, uint32_t stream) const {
        return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32),
                static_cast<uint32_t>(first_sample + sample), static_cast<uint32_t>(draw), stream};
    }
};

enum Stream : uint32_t { kStreamXT, kStreamReverseStep, kStreamQSample, kStreamTimesteps };

}  // namespace dd
