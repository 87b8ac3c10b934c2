// Partitions the elements of a sample into units: the elements that one thread of an elementwise kernel handles.
//
// Noise counts elements in [channels][pixels] order, four (a quad) per call of Philox, whatever the order in memory. A
// unit therefore holds whole quads in both orders. It consists of rows of eight consecutive elements: 16 bytes of a
// 16-bit dtype, 32 bytes of float32. In the order `paired`, which serves float32, two threads share sixteen elements
// and each takes every other quad, so that together they fill L2's sectors of 32 bytes with each access; 16-bit
// tensors are still accessed by 16 bytes per thread, and the pair exchanges half of them.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/cuda_device.cuh"
#include "common/cuda_launch.h"
#include "common/cuda_math.cuh"

namespace dd::cuda {

enum class Order {
    contiguous,  // eight consecutive elements
    channels_3,  // channels last, three of them: eight pixels
    channels_4,  // channels last, four of them: eight pixels
    channels_8,  // channels last, a multiple of eight: eight channels of four pixels
    any,         // one element: for all other shapes and for addresses that are not multiples of 16
    paired,      // contiguous: two threads share sixteen elements, each has every other quad
};

constexpr int kUnitThreads = 128;

DD_HOST_DEVICE constexpr int unit_rows(Order order) {
    return order == Order::channels_3 ? 3 : order == Order::channels_4 || order == Order::channels_8 ? 4 : 1;
}

// Distance in elements between the two quads of a row.
DD_HOST_DEVICE constexpr int quad_gap(Order order) { return order == Order::paired ? 8 : 4; }

// Blocks per multiprocessor that the compiler plans registers for: 64 per thread, or 168.
DD_HOST_DEVICE constexpr int unit_blocks(Order order) { return unit_rows(order) == 1 ? 8 : 3; }

DD_HOST_DEVICE constexpr int unit_width(Order order) { return order == Order::any ? 1 : 8; }

inline int64_t units_per_sample(Order order, const Layout& layout) {
    switch (order) {
        case Order::contiguous:
        case Order::paired:
        case Order::channels_3:
        case Order::channels_4:
            return layout.pixels / 8;
        case Order::channels_8:
            return layout.pixels / 4 * (layout.channels / 8);
        case Order::any:
            break;
    }
    return layout.pixels * layout.channels;
}

inline bool has_16_byte_rows(const Operand& operand) {
    return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 &&
           operand.sample_stride * element_size(operand.dtype) % 16 == 0;
}

inline Order order_of(const Layout& layout, std::initializer_list<Operand> operands) {
    for (const Operand& operand : operands) {
        if (operand && !has_16_byte_rows(operand)) return Order::any;
    }
    auto is_float32 = [](const Operand& operand) { return operand && operand.dtype == DType::float32; };
    if (layout.channels == 1) {
        if (layout.pixels % 8 != 0) return Order::any;
        const bool whole_warps = layout.pixels % (8 * kWarp) == 0;  // so that both threads of a pair have a unit
        return whole_warps && std::any_of(operands.begin(), operands.end(), is_float32) ? Order::paired
                                                                                        : Order::contiguous;
    }
    if (layout.channels % 8 == 0) return layout.pixels % 4 == 0 ? Order::channels_8 : Order::any;
    if (layout.pixels % 8 != 0) return Order::any;
    return layout.channels == 3 ? Order::channels_3 : layout.channels == 4 ? Order::channels_4 : Order::any;
}

// Returns the number of blocks that cover `units` per sample. Where there are many more blocks than a chip holds, each
// thread handles up to four units, which share what it computes once per sample.
inline int64_t unit_grid_blocks(int64_t units, int64_t samples) {
    constexpr int64_t plenty = 4096, most = 4;
    const int64_t blocks = (units + kUnitThreads - 1) / kUnitThreads;
    const int64_t turns = std::clamp<int64_t>(blocks * samples / plenty, 1, most);
    return (blocks + turns - 1) / turns;
}

// Calls start(std::integral_constant<Order, order>, grid).
template <class Start>
void for_units(const Layout& layout, std::initializer_list<Operand> operands, const Start& start) {
    Order order = order_of(layout, operands);
    const int64_t blocks = unit_grid_blocks(units_per_sample(order, layout), layout.samples);
    const Grid grid{blocks, std::min(layout.samples, kMaxGridRows), kUnitThreads};
    switch (order) {
        case Order::contiguous:
            return start(std::integral_constant<Order, Order::contiguous>{}, grid);
        case Order::paired:
            return start(std::integral_constant<Order, Order::paired>{}, grid);
        case Order::channels_3:
            return start(std::integral_constant<Order, Order::channels_3>{}, grid);
        case Order::channels_4:
            return start(std::integral_constant<Order, Order::channels_4>{}, grid);
        case Order::channels_8:
            return start(std::integral_constant<Order, Order::channels_8>{}, grid);
        case Order::any:
            return start(std::integral_constant<Order, Order::any>{}, grid);
    }
}

DD_DEVICE void normal_quad(int64_t quad, const NoiseCounter& at, float z[4]) {
    uint32_t words[4] = {static_cast<uint32_t>(quad), at.sample, at.draw, at.stream};
    philox4x32_10(words, at.key0, at.key1);
    box_muller(words[0], words[1], z[0], z[1]);
    box_muller(words[2], words[3], z[2], z[3]);
}

template <Order order>
struct Unit {
    static constexpr int kRows = unit_rows(order), kWidth = unit_width(order);

    int64_t pixels, index;  // index: of the unit in its sample
    int64_t channels;

    DD_DEVICE explicit Unit(const Layout& layout)
        : pixels(layout.pixels),
          index(static_cast<int64_t>(blockIdx.x) * kUnitThreads + threadIdx.x),
          channels(layout.channels) {}

    DD_DEVICE void next() { index += static_cast<int64_t>(gridDim.x) * kUnitThreads; }

    DD_DEVICE bool exists() const {
        if constexpr (order == Order::any) return index < pixels * channels;
        if constexpr (order == Order::channels_8) return index < pixels / 4 * (channels / 8);
        return index < pixels / 8;
    }

    // Returns the offset of a row's first element in the sample.
    DD_DEVICE int64_t offset(int row) const {
        if constexpr (order == Order::channels_8) {
            return (index / (channels / 8) * 4 + row) * channels + index % (channels / 8) * 8;
        }
        if constexpr (order == Order::paired) return index / 2 * 16 + index % 2 * 4;
        return (index * kRows + row) * kWidth;
    }

    DD_DEVICE void normals(const NoiseCounter& at, float z[kRows][kWidth]) const {
        float quad[4];
        if constexpr (order == Order::any) {
            int64_t element = index % channels * pixels + index / channels;
            normal_quad(element / 4, at, quad);
            z[0][0] = element & 2 ? (element & 1 ? quad[3] : quad[2]) : (element & 1 ? quad[1] : quad[0]);
        } else if constexpr (order == Order::channels_8) {
            int64_t pixel = index / (channels / 8) * 4, channel = index % (channels / 8) * 8;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                normal_quad(((channel + k) * pixels + pixel) / 4, at, quad);
#pragma unroll
                for (int i = 0; i < 4; ++i) z[i][k] = quad[i];
            }
        } else if constexpr (order == Order::paired) {
            normal_quad(offset(0) / 4, at, z[0]);
            normal_quad((offset(0) + quad_gap(order)) / 4, at, z[0] + 4);
        } else {
            constexpr int kChannels = kRows;
#pragma unroll
            for (int k = 0; k < 2 * kChannels; ++k) {
                int channel = k / 2, pixel = k % 2 * 4;
                normal_quad((channel * pixels + index * 8 + pixel) / 4, at, quad);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int element = (pixel + i) * kChannels + channel;
                    z[element / 8][element % 8] = quad[i];
                }
            }
        }
    }
};

// Converts between the eight consecutive 16-bit elements that a thread accesses and the two quads of its row: within a
// pair, the first thread's second quad swaps places with the second thread's first quad.
template <Order order>
DD_DEVICE uint4 exchanged(uint4 words) {
    if constexpr (order != Order::paired) return words;
    const bool second = threadIdx.x % 2 != 0;
    const uint32_t x = __shfl_xor_sync(0xffffffffu, second ? words.x : words.z, 1);
    const uint32_t y = __shfl_xor_sync(0xffffffffu, second ? words.y : words.w, 1);
    return uint4{second ? x : words.x, second ? y : words.y, second ? words.z : x, second ? words.w : y};
}

// Returns the offset in a 16-bit tensor of the 16 bytes that the thread with the row at `offset` accesses.
template <Order order>
DD_DEVICE int64_t offset_of_16_bytes(int64_t offset) {
    return order == Order::paired ? offset + threadIdx.x % 2 * 4 : offset;
}

// A row in the tensor's dtype; constructing it loads it, ahead of its use.
template <Order order>
struct Row {
    uint4 low, high;  // high is only used for float32

    DD_DEVICE Row(const Operand& x, int64_t sample, int64_t offset) {
        const int64_t first = sample * x.sample_stride;
        if (x.dtype == DType::float32) {
            const float* p = static_cast<const float*>(x.data) + first + offset;
            low = *reinterpret_cast<const uint4*>(p);
            high = *reinterpret_cast<const uint4*>(p + quad_gap(order));
        } else {
            const uint16_t* p = static_cast<const uint16_t*>(x.data) + first + offset_of_16_bytes<order>(offset);
            low = *reinterpret_cast<const uint4*>(p);
        }
    }

    DD_DEVICE void floats(DType dtype, float v[8]) const {
        if (dtype == DType::float32) {
            unpack<DType::float32>(low, v);
            unpack<DType::float32>(high, v + 4);
            return;
        }
        const uint4 words = exchanged<order>(low);
        if (dtype == DType::bfloat16) {
            unpack<DType::bfloat16>(words, v);
        } else {
            unpack<DType::float16>(words, v);
        }
    }
};

template <>
struct Row<Order::any> {
    float value;

    DD_DEVICE Row(const Operand& x, int64_t sample, int64_t offset)
        : value(load_element(x.data, sample * x.sample_stride + offset, x.dtype)) {}

    DD_DEVICE void floats(DType, float v[1]) const { v[0] = value; }
};

template <Order order>
DD_DEVICE void load_row(const Operand& x, int64_t sample, int64_t offset, float v[unit_width(order)]) {
    Row<order>(x, sample, offset).floats(x.dtype, v);
}

template <Order order>
DD_DEVICE void store_row(const Operand& y, int64_t sample, int64_t offset, const float v[unit_width(order)]) {
    const int64_t first = sample * y.sample_stride;
    if constexpr (order == Order::any) {
        store_element(y.data, first + offset, y.dtype, v[0]);
    } else if (y.dtype == DType::float32) {
        float* p = static_cast<float*>(y.data) + first + offset;
        store_16_bytes(p, pack<DType::float32>(v));
        store_16_bytes(p + quad_gap(order), pack<DType::float32>(v + 4));
    } else {
        const uint4 words = y.dtype == DType::bfloat16 ? pack<DType::bfloat16>(v) : pack<DType::float16>(v);
        uint16_t* p = static_cast<uint16_t*>(y.data) + first + offset_of_16_bytes<order>(offset);
        store_16_bytes(p, exchanged<order>(words));
    }
}

}  // namespace dd::cuda
