// The gated scan on the GPU: which kernels, and how many blocks.
//
// The kernels are made for two directions, forward and backward, with one state component (gated_scan_*.cuh). Any other
// scan runs on general_scan.cu, with normalisation and gate after it.
#include "scan/cuda/chunks.h"
#include "scan/cuda/norm.cuh"
#include "scan/cuda/plan.h"
#include "scan/cuda/states.cuh"

namespace mobilemamba {
namespace {

constexpr int kNormThreads = 256;

template <typename T>
void run_norm(const Tensor& sum, const NormTensors& norm, Tensor& y) {
  const int64_t rows = norm.z.size(0);
  constexpr int kRows = kNormThreads / kLanes;
  launch(
      norm_gate_kernel<T>, dim3(ceil_div<int64_t>(rows, kRows)), kNormThreads, 0, sum.const_data_ptr<float>(),
      norm.inputs<T>(), rows, static_cast<int>(norm.z.size(1)), y.mutable_data_ptr<T>());
}

}  // namespace

Tensor gated_scan_cuda(
    const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    at::IntArrayRef reverse) {
  check_scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
  check_gate(x, z, norm_weight, norm_bias);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType type = common_type(x, z, projection);
  Tensor y = at::empty(x.sizes(), x.options().dtype(type));
  if (x.numel() == 0)
    return y.to(x.scalar_type());
  const NormTensors norm(z, type, norm_weight, norm_bias, eps);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (!is_special(dt_weight, A_log, reverse)) {
      run_norm<T>(selective_scan_cuda(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse), norm, y);
      return;
    }
    const ScanTensors scan(x, type, projection, dt_weight, dt_bias, A_log, D_skip);
    with_rank(scan.rank, [&](auto blocks) {
      constexpr int NR = decltype(blocks)::value;
      if constexpr (8 * NR <= kMaxFusedRank) {
        if (is_fused<NR>(scan, false)) {
          FusedOutputs<T> outputs{};
          outputs.y = y.mutable_data_ptr<T>();
          launch_fused<T, NR, false>(scan, norm, outputs);
          return;
        }
      }
      Tensor sum = empty_floats(x.sizes(), x);
      run_split<T, NR>(scan, sum, nullptr);
      run_norm<T>(sum, norm, y);
    });
  });
  return y.to(x.scalar_type());
}

std::tuple<Tensor, Tensor> gated_scan_with_states_cuda(
    const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    at::IntArrayRef reverse) {
  const Tensor y =
      gated_scan_cuda(x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias, eps, reverse);
  const int count = is_special(dt_weight, A_log, reverse) ? num_states(static_cast<int>(x.size(1))) : 0;
  Tensor states = empty_floats({x.size(0), 2, count, x.size(2)}, x);
  if (states.numel() == 0)
    return {y, states};
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType type = common_type(x, z, projection);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const ScanTensors scan(x, type, projection, dt_weight, dt_bias, A_log, D_skip);
    launch(
        states_kernel<T>, dim3(scan.batch, scan.groups(), 2), kLanes, 0, scan.inputs<T>(),
        states.mutable_data_ptr<float>());
  });
  return {y, states};
}

}  // namespace mobilemamba
