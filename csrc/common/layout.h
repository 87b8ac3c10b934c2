// Describes tensors to the kernels, which see no type of torch.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dd {

enum class DType { float32, bfloat16, float16 };

// A tensor whose samples are dense, all in the same order, and start sample_stride elements apart.
struct Operand {
    void* data = nullptr;
    int64_t sample_stride = 0;
    DType dtype = DType::float32;

    DD_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
    bool has_16_bits() const { return data != nullptr && dtype != DType::float32; }
};

// How the samples of a call lie in memory: [pixels][channels], which kernels visit in tiles of whole pixels. A
// contiguous tensor counts as one channel of many pixels.
struct Layout {
    int64_t samples, pixels, channels;
    int64_t tile_pixels;

    int64_t tiles_per_sample() const { return (pixels + tile_pixels - 1) / tile_pixels; }
    int64_t tiles() const { return samples * tiles_per_sample(); }
    int64_t tile_elements() const { return tile_pixels * channels; }
};

// Consecutive elements of one sample.
struct Run {
    int64_t sample, offset, elements;  // the offset is within the sample
};

// The run that a kernel works on at a time: all channels of some pixels, few enough to stay in the L1 cache.
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

// A row of a table for every sample: one value per sample, or one for all (stride 0).
struct SampleIndex {
    const int64_t* values;
    int64_t stride;

    DD_HOST_DEVICE int64_t operator[](int64_t sample) const { return values[sample * stride]; }
};

// Philox's key, and its counter without the quad: they distinguish the noise of one sample from all other noise.
struct NoiseCounter {
    uint32_t key0, key1, sample, draw, stream;
};

// (seed, first_sample, draw), which the ops receive as an int64 tensor [3].
struct NoiseKey {
    int64_t seed, first_sample, draw;

    DD_HOST_DEVICE NoiseCounter counter(int64_t sample, int64_t draw, uint32_t stream) const {
        return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32),
                static_cast<uint32_t>(first_sample + sample), static_cast<uint32_t>(draw), stream};
    }
};

// Reads a key from memory; on a GPU a kernel calls this, since the key is in device memory.
DD_HOST_DEVICE NoiseKey load_key(const int64_t* key) { return {key[0], key[1], key[2]}; }

enum Stream : uint32_t { kStreamXT, kStreamReverseStep, kStreamQSample, kStreamTimesteps };

}  // namespace dd
