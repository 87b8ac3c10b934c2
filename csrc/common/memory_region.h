// The memory that a tensor covers, and whether two tensors overlap.
#pragma once

#include <cstdint>

namespace dd {

// `samples` stretches of `bytes` each, `stride` bytes from the start of one to the start of the next.
struct MemoryRegion {
    const char* begin;
    int64_t bytes, stride, samples;

    bool is_empty() const { return samples == 0 || bytes == 0; }
    const char* end() const { return begin + (samples - 1) * stride + bytes; }

    bool operator==(const MemoryRegion& other) const {
        return begin == other.begin && bytes == other.bytes && stride == other.stride && samples == other.samples;
    }

    // Returns whether two of the stretches share a byte.
    bool overlaps_itself() const { return samples > 1 && stride < bytes; }

    // Returns whether one of the stretches shares a byte with [first, last).
    bool meets(const char* first, const char* last) const {
        // The stretch `i` is the earliest that ends beyond `first`.
        const int64_t passed = first - begin - bytes;
        const int64_t i = passed < 0 ? 0 : stride == 0 ? samples : passed / stride + 1;
        return i < samples && begin + i * stride < last;
    }

    bool overlaps(const MemoryRegion& other) const {
        if (is_empty() || other.is_empty() || end() <= other.begin || other.end() <= begin) return false;
        for (int64_t i = 0; i < samples; ++i) {
            const char* first = begin + i * stride;
            if (other.meets(first, first + bytes)) return true;
        }
        return false;
    }
};

}  // namespace dd
