// Takes the device and the stream of a CUDA op from torch, and registers the op.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace dd::cuda {

using CurrentStreamFunction = AOTITorchError (*)(int32_t device_index, void** stream);

// Finds the function by name in the libtorch_cuda that is loaded: a build against a torch without CUDA has none to
// link.
inline CurrentStreamFunction current_stream_function() {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* function = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    STD_TORCH_CHECK(function, "dd_kernels: this torch has no CUDA (libtorch_cuda.so is not loaded)");
    return reinterpret_cast<CurrentStreamFunction>(function);
}

// Makes the device of x the current one during its lifetime; `stream` is torch's current stream on that device.
class OnDevice {
public:
    explicit OnDevice(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
        static const auto current_stream = current_stream_function();
        void* handle = nullptr;
        // Spelled out, because the macro for this is missing in torch 2.10 and 2.11.
        STD_TORCH_CHECK(current_stream(x.get_device_index(), &handle) == AOTI_TORCH_SUCCESS,
                        "dd_kernels: torch could not return its current CUDA stream");
        stream = static_cast<cudaStream_t>(handle);
    }

    cudaStream_t stream;

private:
    torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace dd::cuda

#define DD_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CUDA, m)
