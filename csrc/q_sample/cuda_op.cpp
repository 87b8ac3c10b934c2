#include "common/cuda_torch.h"
#include "q_sample/binding.h"
#include "q_sample/cuda.h"

namespace dd::cuda {
namespace {

void run(const QSampleArguments& arguments, const Tensor& x_start) { q_sample(arguments, OnDevice(x_start).stream); }

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) { m.impl("q_sample", TORCH_BOX(&dd::q_sample_op<dd::cuda::run>)); }
