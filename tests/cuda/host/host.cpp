// What tests set and ask of the CUDA kernels on the host, through ctypes.
#include <cuda_runtime.h>

#pragma GCC visibility push(default)
extern "C" {

// The chip that kernels are planned for.
void dd_host_chip(int sm_count, int major, int64_t l2_bytes) {
    host_cuda::device.chip = {sm_count, major, l2_bytes};
    ++host_cuda::device.ordinal;
}

// Whether a block's last thread runs first.
void dd_host_backwards(bool backwards) { host_cuda::device.backwards = backwards; }
}
#pragma GCC visibility pop
