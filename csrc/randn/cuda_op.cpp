#include "common/cuda_torch.h"
#include "randn/binding.h"
#include "randn/cuda.h"

namespace dd::cuda {
namespace {

void run(const RandnArguments& arguments, const Tensor& z) { randn(arguments, OnDevice(z).stream); }

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) { m.impl("randn", TORCH_BOX(&dd::randn_op<dd::cuda::run>)); }
