// Dtype, sizes and strides of a tensor as torch reports them, for checks and for the text of their errors.
#pragma once

#include <string>

#include "common/tensors.h"

namespace dd {

template <class T>
constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;

// Returns the name of a dtype: as in Python for the dtypes that calls are likely to have, else as in C++.
inline const char* dtype_name(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Int:
            return "int32";
        default:
            return toString(type);
    }
}

inline std::string shape_text(const int64_t* sizes, int64_t dims) {
    std::string result = "[";
    for (int64_t i = 0; i < dims; ++i) result += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    return result + "]";
}

// The facts of a tensor that the checks need. Each is asked of torch once, since a question costs some nanoseconds.
struct TensorFacts {
    const char* name;
    ScalarType type;
    int64_t dims, elements;
    const int64_t *sizes, *strides;
    bool is_contiguous;

    TensorFacts(const char* name, const Tensor& x) : name(name), type(scalar_type_of(x)), elements(1) {
        int64_t *its_sizes, *its_strides;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &its_sizes));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &its_strides));
        dims = x.dim();
        sizes = its_sizes;
        strides = its_strides;
        is_contiguous = true;
        for (int64_t d = dims - 1; d >= 0; --d) {
            is_contiguous = is_contiguous && (sizes[d] == 1 || strides[d] == elements);
            elements *= sizes[d];
        }
        is_contiguous = is_contiguous || elements == 0;
    }

    bool is_float() const {
        return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
    }
    DType dtype() const {
        return type == ScalarType::Float      ? DType::float32
               : type == ScalarType::BFloat16 ? DType::bfloat16
                                              : DType::float16;
    }

    std::string text() const {
        return std::string(dtype_name(type)) + " " + shape_text(sizes, dims) + " with strides " +
               shape_text(strides, dims);
    }
};

}  // namespace dd
