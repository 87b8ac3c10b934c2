// Checks the tensors of one call of an op: their devices, dtypes, shapes and strides, and that what the op writes
// overlaps nothing else. Where a check fails it throws an error that names the argument, before anything is written.
#pragma once

#include <array>
#include <initializer_list>
#include <string>

#include "common/memory_region.h"
#include "common/tensor_facts.h"
#include "common/tensors.h"

namespace dd {

class TensorChecks {
public:
    using Shape = std::initializer_list<int64_t>;

    // `x` [N, ...] gives the call its shape, its layout (contiguous or channels_last) and its device. It is checked
    // further where it is handed to input() or output(), and lives as long as this object.
    TensorChecks(const char* op, const char* name, const Tensor& x)
        : op_(op), x_(name, x), is_cpu_(x.is_cpu()), device_(is_cpu_ ? 0 : x.get_device_index()) {
        if (x_.dims < 1) fail(name, "[N, ...]", x_.text());
        if (!x_.is_contiguous && !is_channels_last(x)) fail(name, "contiguous or channels_last", x_.text());
        if (x_.is_contiguous && x_.elements > 0) {
            layout_ = contiguous_layout(x_.sizes[0], x_.elements / x_.sizes[0]);
        } else {
            layout_ = layout_of(x);
        }
    }

    const Layout& layout() const { return layout_; }
    const TensorFacts& x() const { return x_; }

    // Checks a tensor of x's shape that the op reads: dense in a sample, in the order of x; samples may lie further
    // apart, or all in one place. With `channels`, its dimension 1 is that instead of x's.
    Operand input(const char* name, const Tensor& y, int64_t channels = kAsX) {
        return add_samples(check_samples(name, y, channels), y.const_data_ptr());
    }
    Operand input(const char* name, const std::optional<Tensor>& y, int64_t channels = kAsX) {
        return y ? input(name, *y, channels) : Operand{};
    }

    // Checks a tensor that the op writes, as input() does. Called after all inputs. The tensor may be the very one that
    // `in_place` is.
    Operand output(const char* name, const Tensor& y, const Operand& in_place = {}, int64_t channels = kAsX) {
        const Operand result = add_samples(check_samples(name, y, channels), y.mutable_data_ptr());
        check_last_overlaps_nothing(name, in_place);
        return result;
    }
    Operand output(const char* name, const std::optional<Tensor>& y, const Operand& in_place = {},
                   int64_t channels = kAsX) {
        return y ? output(name, *y, in_place, channels) : Operand{};
    }

    // Checks a tensor of x's dtype and of `shape`, dense in channels_last, that the op reads.
    Operand image(const char* name, const Tensor& y, Shape shape) {
        return add_samples(check_image(name, y, shape), y.const_data_ptr());
    }
    Operand image(const char* name, const std::optional<Tensor>& y, Shape shape) {
        return y ? image(name, *y, shape) : Operand{};
    }

    // Checks a tensor that the op writes, as image() does. Called after all inputs.
    Operand written_image(const char* name, const Tensor& y, Shape shape) {
        const Operand result = add_samples(check_image(name, y, shape), y.mutable_data_ptr());
        check_last_overlaps_nothing(name, {});
        return result;
    }

    // Checks a tensor of `shape`, contiguous or channels_last, that the op reads, of one of the kernels' dtypes.
    Operand filters(const char* name, const Tensor& y, Shape shape) {
        return add_contiguous(check_filters(name, y, shape), y.const_data_ptr());
    }

    // Checks a tensor of float32 that the op writes, as filters() does. Called after all inputs.
    Operand written_filters(const char* name, const Tensor& y, Shape shape) {
        const TensorFacts facts = check_filters(name, y, shape);
        if (facts.type != ScalarType::Float) fail(name, "float32", facts.text());
        const Operand result = add_contiguous(facts, y.mutable_data_ptr());
        check_last_overlaps_nothing(name, {});
        return result;
    }

    // Checks a tensor of x's dtype and of `shape`, of which only the last dimension must be dense, that the op reads.
    Operand rows(const char* name, const Tensor& tensor, Shape shape) {
        const TensorFacts y = check_shape(name, tensor, shape);
        check_float(y);
        if (y.type != x_.type) fail(name, std::string("of the dtype of ") + x_.name, y.text());
        const int64_t last = y.dims - 1, size = y.type == ScalarType::Float ? 4 : 2;
        if (y.elements > 0 && y.sizes[last] > 1 && y.strides[last] != 1) {
            fail(name, "dense in its last dimension", y.text());
        }
        int64_t elements = y.elements > 0 ? 1 : 0;
        for (int64_t d = 0; elements > 0 && d < y.dims; ++d) elements += (y.sizes[d] - 1) * y.strides[d];
        add(name, {static_cast<const char*>(tensor.const_data_ptr()), elements * size, 0, 1}, size);
        return {const_cast<void*>(tensor.const_data_ptr()), 0, y.dtype()};
    }

    // Checks a contiguous tensor of `shape` that the op reads, of one of the kernels' dtypes.
    Operand parameters(const char* name, const std::optional<Tensor>& y, Shape shape) {
        return y ? add_contiguous(check_parameters(name, *y, shape), y->const_data_ptr()) : Operand{};
    }

    // Checks a tensor that the op writes, as parameters() does. Called after all inputs.
    Operand written_parameters(const char* name, const std::optional<Tensor>& y, Shape shape) {
        if (!y) return {};
        const Operand result = add_contiguous(check_parameters(name, *y, shape), y->mutable_data_ptr());
        check_last_overlaps_nothing(name, {});
        return result;
    }

    // Checks a contiguous tensor of T and of `shape` that the op reads.
    template <class T>
    const T* values(const char* name, const Tensor& y, Shape shape) {
        return static_cast<const T*>(add_contiguous(check_values<T>(name, y, shape), y.const_data_ptr()).data);
    }
    template <class T>
    const T* values(const char* name, const std::optional<Tensor>& y, Shape shape) {
        return y ? values<T>(name, *y, shape) : nullptr;
    }

    // Checks a tensor that the op writes, as values() does. Called after all inputs.
    template <class T>
    T* written_values(const char* name, const std::optional<Tensor>& y, Shape shape) {
        if (!y) return nullptr;
        void* data = add_contiguous(check_values<T>(name, *y, shape), y->mutable_data_ptr()).data;
        check_last_overlaps_nothing(name, {});
        return static_cast<T*>(data);
    }

    // Checks int64 [1] or [N], which holds for every sample a row of a table.
    SampleIndex index(const char* name, const Tensor& y) {
        const bool is_shared = y.dim() == 1 && y.size(0) == 1;
        return {values<int64_t>(name, y, {is_shared ? 1 : x_.sizes[0]}), is_shared ? 0 : 1};
    }

    // Checks int64 [3], which holds seed, first_sample and draw.
    const int64_t* noise_key(const char* name, const std::optional<Tensor>& y) { return values<int64_t>(name, y, {3}); }

    // Raises unless a tensor has so many dimensions, of which a shape is then made.
    void dimensions(const char* name, const Tensor& y, int64_t wanted) const {
        if (y.dim() != wanted) fail(name, "of " + std::to_string(wanted) + " dimensions", TensorFacts(name, y).text());
    }

    [[noreturn]] void fail(const char* name, const std::string& wanted, const std::string& got) const {
        refuse(op_, name, wanted, got);
    }

private:
    static constexpr int64_t kAsX = -1;
    static constexpr int kMostTensors = 32;

    struct NamedRegion {
        const char* name;
        MemoryRegion region;
    };

    TensorFacts check_device(const char* name, const Tensor& y) const {
        if (y.is_cpu() != is_cpu_ || (!is_cpu_ && y.get_device_index() != device_)) {
            fail(name, std::string("on the device of ") + x_.name, "a tensor on another");
        }
        return TensorFacts(name, y);
    }

    void check_float(const TensorFacts& y) const {
        if (!y.is_float()) fail(y.name, "float32, bfloat16 or float16", y.text());
    }

    TensorFacts check_samples(const char* name, const Tensor& tensor, int64_t channels) const {
        const TensorFacts y = check_device(name, tensor);
        check_float(y);
        const auto wanted = [&](int64_t d) { return d == 1 && channels != kAsX ? channels : x_.sizes[d]; };
        bool has_shape = y.dims == x_.dims;
        for (int64_t d = 0; has_shape && d < x_.dims; ++d) has_shape = y.sizes[d] == wanted(d);
        if (!has_shape) {
            std::string shape = shape_text(x_.sizes, x_.dims);
            if (channels != kAsX) shape += " with " + std::to_string(channels) + " channels";
            fail(name, std::string("of the shape of ") + x_.name + ", " + shape, y.text());
        }
        const bool is_last = layout_.channels > 1;
        bool is_dense = true;
        for (int64_t i = x_.dims - 1, expected = 1; i > 0; --i) {
            const int64_t d = is_last ? i % 3 + 1 : i;  // channels_last: 1, 3, 2 of [N, C, H, W]
            is_dense = is_dense && (y.sizes[d] == 1 || y.strides[d] == expected);
            expected *= y.sizes[d];
        }
        if (!is_dense && y.elements > 0) {
            fail(name, std::string("dense in a sample, in the order of ") + x_.name, y.text());
        }
        return y;
    }

    TensorFacts check_shape(const char* name, const Tensor& tensor, Shape shape) const {
        const TensorFacts y = check_device(name, tensor);
        if (!std::equal(shape.begin(), shape.end(), y.sizes, y.sizes + y.dims)) {
            fail(name, "of the shape " + shape_text(shape.begin(), static_cast<int64_t>(shape.size())), y.text());
        }
        return y;
    }

    TensorFacts check_image(const char* name, const Tensor& tensor, Shape shape) const {
        const TensorFacts y = check_shape(name, tensor, shape);
        check_float(y);
        if (y.type != x_.type) fail(name, std::string("of the dtype of ") + x_.name, y.text());
        if (y.elements > 0 && !is_channels_last(tensor)) fail(name, "channels_last", y.text());
        return y;
    }

    TensorFacts check_filters(const char* name, const Tensor& tensor, Shape shape) const {
        const TensorFacts y = check_shape(name, tensor, shape);
        check_float(y);
        if (!y.is_contiguous && !is_channels_last(tensor)) fail(name, "contiguous or channels_last", y.text());
        return y;
    }

    TensorFacts check_contiguous(const char* name, const Tensor& tensor, Shape shape) const {
        const TensorFacts y = check_shape(name, tensor, shape);
        if (!y.is_contiguous) fail(name, "contiguous", y.text());
        return y;
    }

    TensorFacts check_parameters(const char* name, const Tensor& tensor, Shape shape) const {
        const TensorFacts y = check_contiguous(name, tensor, shape);
        check_float(y);
        return y;
    }

    template <class T>
    TensorFacts check_values(const char* name, const Tensor& tensor, Shape shape) const {
        const TensorFacts y = check_contiguous(name, tensor, shape);
        if (y.type != kScalarType<T>) fail(name, dtype_name(kScalarType<T>), y.text());
        return y;
    }

    void add(const char* name, const MemoryRegion& region, int64_t element_size) {
        if ((reinterpret_cast<uintptr_t>(region.begin) & static_cast<uintptr_t>(element_size - 1)) != 0) {
            fail(name, "aligned to its elements", "an address between two");
        }
        if (count_ == kMostTensors) fail(name, "one of at most 32 tensors", "one more");
        tensors_[count_++] = {name, region};
    }

    Operand add_samples(const TensorFacts& y, const void* data) {
        const int64_t samples = y.sizes[0], size = y.type == ScalarType::Float ? 4 : 2;
        const Operand result{const_cast<void*>(data), samples > 1 ? y.strides[0] : 0, y.dtype()};
        const int64_t bytes = samples == 0 ? 0 : y.elements / samples * size;
        add(y.name, {static_cast<const char*>(data), bytes, result.sample_stride * size, samples}, size);
        return result;
    }

    Operand add_contiguous(const TensorFacts& y, const void* data) {
        const int64_t size = y.type == ScalarType::Long ? 8 : y.type == ScalarType::Float ? 4 : 2;
        add(y.name, {static_cast<const char*>(data), y.elements * size, 0, 1}, size);
        return {const_cast<void*>(data), 0, y.dtype()};
    }

    void check_last_overlaps_nothing(const char* name, const Operand& in_place) const {
        const MemoryRegion& written = tensors_[count_ - 1].region;
        if (written.overlaps_itself()) fail(name, "a tensor whose samples do not overlap", "one whose samples do");
        for (int i = 0; i < count_ - 1; ++i) {
            const auto& [other, region] = tensors_[i];
            if (region.begin == in_place.data && region == written) continue;
            if (written.overlaps(region)) {
                fail(name, std::string("apart from ") + other, "tensors that overlap in memory");
            }
        }
    }

    const char* op_;
    TensorFacts x_;
    bool is_cpu_;
    int32_t device_;
    Layout layout_;
    std::array<NamedRegion, kMostTensors> tensors_;
    int count_ = 0;
};

}  // namespace dd
