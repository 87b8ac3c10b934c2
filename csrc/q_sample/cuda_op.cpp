#include "common/cuda_torch.h"
#include "common/tensors.h"
#include "q_sample/cuda.h"

namespace dd::cuda {
namespace {

void q_sample_op(Tensor x_start, std::optional<Tensor> noise, Tensor rows, Tensor t, std::optional<Tensor> key,
                 Tensor x_t, std::optional<Tensor> noise_out) {
    OnDevice device(x_start);
    QSampleArguments a{};
    a.layout = layout_of(x_start);
    a.x_start = operand(x_start);
    a.noise = operand(noise);
    a.rows = data<float>(rows);
    a.row_count = rows.size(0);
    a.t = data<int64_t>(t);
    a.t_stride = per_sample(t);
    a.key = data<int64_t>(key);
    a.x_t = operand(x_t);
    a.noise_out = operand(noise_out);
    q_sample(a, device.stream);
}

}  // namespace
}  // namespace dd::cuda

DD_CUDA_OPS(m) { m.impl("q_sample", TORCH_BOX(&dd::cuda::q_sample_op)); }
