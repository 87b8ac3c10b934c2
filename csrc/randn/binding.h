// Registers torch.ops.dd_kernels.randn, with checks; run(arguments, z) runs a checked call on a device.
#pragma once

#include "common/tensor_checks.h"
#include "randn/arguments.h"

namespace dd {

template <void (*run)(const RandnArguments&, const Tensor&)>
void randn_op(Tensor z, Tensor key, int64_t stream) {
    TensorChecks checks("randn", "z", z);
    RandnArguments a{};
    a.layout = checks.layout();
    a.key = checks.noise_key("key", key);
    a.z = checks.output("z", z);
    if (stream < 0 || stream > UINT32_MAX) checks.fail("stream", "in [0, 2^32)", std::to_string(stream));
    a.stream = static_cast<uint32_t>(stream);
    run(a, z);
}

}  // namespace dd
