#include "common/cuda_torch.h"
#include "common/tensors.h"
#include "randn/cuda.h"

namespace dd::cuda {
namespace {

void randn_op(Tensor z, Tensor key, int64_t stream) {
    OnDevice device(z);
    randn({layout_of(z), operand(z), data<int64_t>(key), static_cast<uint32_t>(stream)}, device.stream);
}

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) { m.impl("randn", TORCH_BOX(&dd::cuda::randn_op)); }
