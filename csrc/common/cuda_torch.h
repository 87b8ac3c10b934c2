// Where torch wants a CUDA op to run, and the op's registration.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace dd::cuda {

using CurrentStreamFunction = AOTITorchError (*)(int32_t device_index, void** stream);

// A build against a torch without CUDA has no libtorch_cuda to link with. Where this library is loaded
// torch has brought its own, which is found by its name.
inline CurrentStreamFunction current_stream_function() {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* function = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    STD_TORCH_CHECK(function, "dd_kernels: this torch has no CUDA (libtorch_cuda.so is not loaded)");
    return reinterpret_cast<CurrentStreamFunction>(function);
}

// The device of x is the current one for as long as this lives; stream is torch's current stream there.
class OnDevice {
public:
    explicit OnDevice(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
        static const auto current_stream = current_stream_function();
        void* handle = nullptr;
        // torch 2.13 has a macro for this; 2.10 and 2.11 have not.
        STD_TORCH_CHECK(current_stream(x.get_device_index(), &handle) == AOTI_TORCH_SUCCESS,
                        "dd_kernels: torch does not tell its current CUDA stream");
        stream = static_cast<cudaStream_t>(handle);
    }

    cudaStream_t stream;

private:
    torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace dd::cuda

#define DD_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dd_kernels, CUDA, m)
