// From the tensors of conv2d's ops to the structs of its kernels, with the checks that keep them inside the tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>

#include "common/cpu_isa.h"
#include "common/tensors.h"
#include "conv2d/plan.h"

namespace dd::conv2d {

// Workspace that starts on a cache line. A thread keeps one of each use for its next call, as large as the largest yet:
// the pages of fresh memory take a twentieth of a convolution's time.
class Workspace {
public:
    enum Use { input, other_input, filters, scratch, uses };

    // Memory of `count` floats, whose content is undefined.
    static float* of(Use use, int64_t count) {
        thread_local Workspace kept[uses];
        return kept[use].at_least(count);
    }

private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };

    float* at_least(int64_t count) {
        if (count > count_) {
            count_ = 0;
            memory_.reset();
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(count * 4, 64)))));
            if (memory_ == nullptr) throw std::bad_alloc();
            count_ = count;
        }
        return memory_.get();
    }

    std::unique_ptr<float[], Free> memory_;
    int64_t count_ = 0;
};

// Calls body(from, to) for parts of [0, count) on the target's threads.
template <class Body>
void on_threads(int64_t count, const Target& target, Body body) {
    if (target.threads == 1) return body(0, count);
    torch::stable::parallel_for(0, count, 1, body);
}

// Raises unless the memory of a tensor starts at a multiple of its elements' size, as kernels read it.
inline void check_aligned(const char* name, const Tensor& tensor) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    STD_TORCH_CHECK(address % static_cast<uintptr_t>(tensor.element_size()) == 0, "conv2d: ", name,
                    " must be aligned to its elements");
}

inline void check_image(const char* name, const Tensor& image, const Tensor& like) {
    STD_TORCH_CHECK(image.dim() == 4 && is_channels_last(image), "conv2d: ", name,
                    " must be [N, C, H, W], channels_last");
    STD_TORCH_CHECK(image.scalar_type() == like.scalar_type(), "conv2d: ", name, " must have the dtype of the others");
    check_aligned(name, image);
    for (int64_t i = 0; i < 4; ++i) {
        STD_TORCH_CHECK(image.size(i) == like.size(i), "conv2d: ", name, " has ", image.size(i), " where ",
                        like.size(i), " is wanted, in dimension ", i);
    }
}

inline void check_floats(const char* name, const std::optional<Tensor>& values, std::initializer_list<int64_t> sizes) {
    if (!values.has_value()) return;
    STD_TORCH_CHECK(values->scalar_type() == ScalarType::Float && values->is_contiguous() &&
                        values->dim() == static_cast<int64_t>(sizes.size()),
                    "conv2d: ", name, " must be contiguous float32 of ", sizes.size(), " dimensions");
    check_aligned(name, *values);
    int64_t i = 0;
    for (int64_t size : sizes) {
        STD_TORCH_CHECK(values->size(i) == size, "conv2d: ", name, " has ", values->size(i), " where ", size,
                        " is wanted, in dimension ", i);
        ++i;
    }
}

// Raises unless a dense tensor that is read and one that is written lie apart in memory.
inline void check_apart(const char* name, const Tensor& read, const char* written_name, const Tensor& written) {
    const char *first = static_cast<const char*>(read.const_data_ptr()),
               *last = first + read.numel() * read.element_size();
    const char* begin = static_cast<const char*>(written.const_data_ptr());
    STD_TORCH_CHECK(last <= begin || begin + written.numel() * written.element_size() <= first, "conv2d: ", name,
                    " and ", written_name, " must not overlap");
}

inline void check_filters(const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float &&
                        (weight.is_contiguous() || is_channels_last(weight)),
                    "conv2d: weight must be float32 [K, C, height, width], contiguous or channels_last");
    check_aligned("weight", weight);
}

// weight: [outputs, inputs, height, width], or, turned, [inputs, outputs, height, width].
inline Filters filters_of(const Tensor& weight, bool turned) {
    int64_t second = weight.size(1), taps = weight.size(2) * weight.size(3);
    bool contiguous = weight.is_contiguous();
    Filters filters{data<float>(weight), second * taps, contiguous ? taps : 1, contiguous ? 1 : second, turned};
    if (turned) std::swap(filters.output_stride, filters.input_stride);
    return filters;
}

inline Shape shape_of(const Tensor& x, const Tensor& weight, bool turned, const Tensor& y, int64_t stride, int64_t top,
                      int64_t left) {
    check_filters(weight);
    dtype_of(x);
    STD_TORCH_CHECK(x.dim() == 4 && is_channels_last(x), "conv2d: x must be [N, C, H, W], channels_last");
    STD_TORCH_CHECK(y.dim() == 4 && is_channels_last(y), "conv2d: y must be [N, K, H, W], channels_last");
    STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "conv2d: x and y must have one dtype");
    check_aligned("x", x);
    check_aligned("y", y);
    STD_TORCH_CHECK(stride >= 1, "conv2d: stride must be at least 1; got ", stride);
    Shape shape{x.size(0), x.size(1),      x.size(2),      x.size(3), y.size(1), y.size(2),
                y.size(3), weight.size(2), weight.size(3), stride,    top,       left};
    STD_TORCH_CHECK(weight.size(turned ? 0 : 1) == shape.channels && weight.size(turned ? 1 : 0) == shape.outputs,
                    "conv2d: weight is of ", weight.size(turned ? 0 : 1), " to ", weight.size(turned ? 1 : 0),
                    " channels where x has ", shape.channels, " and y ", shape.outputs);
    STD_TORCH_CHECK(y.size(0) == shape.samples, "conv2d: y has ", y.size(0), " samples and x ", shape.samples);
    STD_TORCH_CHECK(shape.channels > 0 && shape.taps() > 0, "conv2d: weight is empty");
    return shape;
}

inline Method method_of(int64_t number, const Shape& shape) {
    STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(Method::winograd4),
                    "conv2d: method must be 0 to 4; got ", number);
    Method method = static_cast<Method>(number);
    bool winograd = method == Method::winograd2 || method == Method::winograd4;
    STD_TORCH_CHECK(!winograd || (shape.kernel_height == 3 && shape.kernel_width == 3 && shape.stride == 1),
                    "conv2d: Winograd's methods take 3 x 3 filters of stride 1");
    return method;
}

// Below a million multiply-adds waking a thread costs more than it gives.
inline int64_t threads_of(const Shape& shape) {
    int64_t products = shape.taps() * shape.channels * shape.outputs;
    double pixels = static_cast<double>(shape.samples * shape.out_height * shape.out_width);
    return static_cast<double>(products) * pixels < 1e6 ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

}  // namespace dd::conv2d
