// The gradients of the gated scan on the GPU: which kernels, how many blocks, and the sums over the blocks' results.
#include <algorithm>

#include "scan/cuda/gated_scan_backward.cuh"
#include "scan/cuda/norm.cuh"
#include "scan/cuda/plan.h"

namespace mobilemamba {
namespace {

constexpr int kNormThreads = 256;

// Turn the sum into its gradient; return dnorm (blocks, 2, D).
template <typename T>
Tensor run_norm_backward(const Tensor& grad, Tensor& sum, const NormTensors& norm, Tensor& dz) {
  const int64_t rows = norm.z.size(0), channels = norm.z.size(1);
  const int row_floats = static_cast<int>(2 * channels);
  TORCH_CHECK(fits_shared(row_floats), "x has ", channels, " channels, too many for the gradient of the norm");
  const int most = static_cast<int>(kPlainSharedBytes / sizeof(float)) / row_floats;
  const int warps = std::clamp(most, 1, kNormThreads / kLanes);
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(rows, warps), 4 * num_multiprocessors());
  Tensor dnorm = empty_floats({blocks, 2, channels}, sum);
  launch(
      norm_gate_backward_kernel<T>, dim3(blocks), warps * kLanes, warps * row_floats, grad.const_data_ptr<T>(),
      row_step(grad), sum.mutable_data_ptr<float>(), norm.inputs<T>(), rows, static_cast<int>(channels),
      dz.mutable_data_ptr<T>(), dnorm.mutable_data_ptr<float>());
  return dnorm;
}

// Gradient of the sum into dsum, dz and checkpoints; return dnorm (B, 2, D).
template <typename T, int NR>
Tensor run_fused_backward(
    const Tensor& grad, const ScanTensors& scan, const NormTensors& norm, Tensor& dsum, Tensor& dz,
    Tensor& checkpoints) {
  Tensor dnorm = empty_floats({scan.batch, 2, scan.channels}, dsum);
  FusedOutputs<T> outputs{};
  outputs.grad = grad.const_data_ptr<T>();
  outputs.grad_row = row_step(grad);
  outputs.dz = dz.mutable_data_ptr<T>();
  outputs.dsum = dsum.mutable_data_ptr<float>();
  outputs.dnorm = dnorm.mutable_data_ptr<float>();
  outputs.checkpoints = checkpoints.mutable_data_ptr<float>();
  launch_fused<T, NR, true>(scan, norm, outputs);
  return dnorm;
}

// Gradients of the scan, given that of its sum; the first in T, the others in float32.
template <typename T, int NR>
ScanGradients run_scan_backward(const ScanTensors& scan, const Tensor& dsum, const Tensor& checkpoints) {
  const auto shared_floats = [](int groups, int segments) { return backward_shared_floats<NR>(groups, segments); };
  const Plan plan(scan, kBackwardThreads / kLanes, kBackwardThreads / kLanes, shared_floats);
  const int64_t B = scan.batch, L = scan.length, D = scan.channels, R = scan.rank;
  Tensor dx = at::empty({B, L, D}, scan.x.options());
  Tensor dprojection = empty_floats({plan.blocks, B, L, 2 * (R + 2)}, dsum);
  Tensor dparameters = empty_floats({B * plan.segments, 2, D, R + 3}, dsum);
  const BackwardOutputs<T> outputs{
      dsum.const_data_ptr<float>(), checkpoints.const_data_ptr<float>(), dx.mutable_data_ptr<T>(),
      dprojection.mutable_data_ptr<float>(), dparameters.mutable_data_ptr<float>()};
  launch(
      scan_backward_kernel<T, NR>, dim3(B, plan.blocks), plan.threads(), shared_floats(plan.groups, plan.segments),
      scan.inputs<T>(), plan.segments, outputs);
  const Tensor sums = dparameters.sum(0);
  const Tensor dD = sums.select(-1, R + 2).select(0, 0);  // the same for both directions
  return {
      dx,
      plan.blocks == 1 ? dprojection.squeeze(0) : dprojection.sum(0),
      copy_of(sums.narrow(-1, 0, R)),
      copy_of(sums.select(-1, R)),
      copy_of(sums.select(-1, R + 1)).view({2 * D, 1}),
      dD.repeat(2)};
}

}  // namespace

GatedGradients gated_scan_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight,
    const Tensor& dt_bias, const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight,
    const Tensor& norm_bias, double eps, at::IntArrayRef reverse, const std::optional<Tensor>&) {
  check_scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
  check_gate(x, z, norm_weight, norm_bias);
  TORCH_CHECK(grad.sizes() == x.sizes(), "grad must have the shape of x, ", x.sizes(), ", got ", grad.sizes());
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0)
    return {
        x.new_zeros(x.sizes()),
        z.new_zeros(z.sizes()),
        projection.new_zeros(projection.sizes()),
        dt_weight.new_zeros(dt_weight.sizes()),
        dt_bias.new_zeros(dt_bias.sizes()),
        A_log.new_zeros(A_log.sizes()),
        D_skip.new_zeros(D_skip.sizes()),
        norm_weight.new_zeros(norm_weight.sizes()),
        norm_bias.new_zeros(norm_bias.sizes())};
  const at::ScalarType type = common_type(x, z, projection);
  const NormTensors norm(z, type, norm_weight, norm_bias, eps);
  const Tensor grad_rows = as_rows(grad, type);
  Tensor dz = at::empty(z.sizes(), z.options().dtype(type)), dnorm;
  ScanGradients gradients;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (!is_special(dt_weight, A_log, reverse)) {
      Tensor sum = selective_scan_cuda(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
      dnorm = run_norm_backward<T>(grad_rows, sum, norm, dz);
      gradients = selective_scan_backward_cuda(sum, x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
      return;
    }
    const ScanTensors scan(x, type, projection, dt_weight, dt_bias, A_log, D_skip);
    Tensor sum = empty_floats(x.sizes(), x);
    Tensor checkpoints = empty_floats({scan.batch, 2, scan.chunks(), scan.channels}, x);
    with_rank(scan.rank, [&](auto blocks) {
      constexpr int NR = decltype(blocks)::value;
      if constexpr (8 * NR <= kMaxFusedRank) {
        if (is_fused<NR>(scan, true))
          dnorm = run_fused_backward<T, NR>(grad_rows, scan, norm, sum, dz, checkpoints);
      }
      if (!dnorm.defined()) {
        run_split<T, NR>(scan, sum, checkpoints.mutable_data_ptr<float>());
        dnorm = run_norm_backward<T>(grad_rows, sum, norm, dz);
      }
      gradients = run_scan_backward<T, NR>(scan, sum, checkpoints);
    });
  });
  const Tensor dnorms = dnorm.sum(0);
  return {
      std::get<0>(gradients).to(x.scalar_type()),
      dz.to(z.scalar_type()),
      std::get<1>(gradients).to(projection.scalar_type()),
      std::get<2>(gradients).to(dt_weight.scalar_type()),
      std::get<3>(gradients).to(dt_bias.scalar_type()),
      std::get<4>(gradients).to(A_log.scalar_type()),
      std::get<5>(gradients).to(D_skip.scalar_type()),
      copy_of(dnorms.select(0, 0)).to(norm_weight.scalar_type()),
      copy_of(dnorms.select(0, 1)).to(norm_bias.scalar_type())};
}

}  // namespace mobilemamba
