// From the tensors of a call of attention to what its kernels take, through the checks that keep them inside the
// tensors.
#pragma once

#include "attention/arguments.h"
#include "common/tensor_checks.h"

namespace dd::attention {

inline Tokens tokens(TensorChecks& checks, const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
    const Operand operand = checks.rows(name, x, shape);
    return {operand.data, x.stride(0), x.stride(1), x.stride(2), operand.dtype};
}

// q [N, heads, queries, depth], k [N, heads, keys, depth] and v [N, heads, keys, outputs] of one dtype, in which the
// last dimension is dense; y [N, queries, heads, outputs], contiguous.
inline Arguments arguments_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Tensor& y) {
    TensorChecks checks("attention", "y", y);
    checks.dimensions("q", q, 4);
    checks.dimensions("v", v, 4);
    Arguments a{};
    a.shape = {q.size(0), q.size(1), q.size(2), v.size(2), q.size(3), v.size(3)};
    const auto& [samples, heads, queries, keys, depth, outputs] = a.shape;
    if (keys == 0 || depth == 0) checks.fail("q", "with keys of some depth", "none");
    a.q = tokens(checks, "q", q, {samples, heads, queries, depth});
    a.k = tokens(checks, "k", k, {samples, heads, keys, depth});
    a.v = tokens(checks, "v", v, {samples, heads, keys, outputs});
    if (!(scale >= 0)) checks.fail("scale", "at least 0", std::to_string(scale));
    a.scale = static_cast<float>(scale / 0.6931471805599453);  // exponents are of 2
    a.y = checks.written_parameters("y", y, {samples, queries, heads, outputs});
    return a;
}

}  // namespace dd::attention
