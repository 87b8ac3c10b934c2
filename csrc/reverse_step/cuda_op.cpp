#include "common/cuda_torch.h"
#include "reverse_step/binding.h"
#include "reverse_step/cuda.h"

namespace dd::cuda {
namespace {

void run(const ReverseStepArguments& arguments, const Tensor& x) { reverse_step(arguments, OnDevice(x).stream); }

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) { m.impl("reverse_step", TORCH_BOX(&dd::reverse_step_op<dd::cuda::run>)); }
