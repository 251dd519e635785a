// The gated scan on the GPU: which kernels, and how many blocks.
//
// The kernels are made for two directions, forward and backward, with one state component (gated_scan_*.cuh): one for
// 16-bit sequences of the widths and lengths of the released networks, and one for all others. Any other scan runs on
// general_scan.cu, with normalisation and gate after it.
#include <cstdint>

#include "scan/cuda/gated_scan_cluster.cuh"
#include "scan/cuda/norm.cuh"
#include "scan/cuda/plan.h"
#include "scan/cuda/states.cuh"

namespace mobilemamba {
namespace {

constexpr int kNormThreads = 256;
constexpr int kMostClusters = 65535;  // of a grid

template <typename T>
void run_norm(const Tensor& sum, const NormTensors& norm, Tensor& y, float2* statistics) {
  const int64_t rows = norm.z.size(0);
  constexpr int kRows = kNormThreads / kLanes;
  launch(
      norm_gate_kernel<T>, dim3(ceil_div<int64_t>(rows, kRows)), kNormThreads, 0, sum.const_data_ptr<float>(),
      norm.inputs<T>(), rows, static_cast<int>(norm.z.size(1)), y.mutable_data_ptr<T>(), statistics);
}

// Widths and chunks for which there is a cluster kernel: those of the released networks' scans, (D, C, whether a chunk
// is a whole image).
template <int kD_, int kC_, bool kIsWhole_>
struct ClusterCase {
  static constexpr int kD = kD_, kC = kC_;
  static constexpr bool kIsWhole = kIsWhole_;
};

template <typename Function, typename... Cases>
bool with_first_of(int64_t channels, int64_t length, Function&& function, Cases... cases) {
  const auto is = [&](auto one) {
    using Case = decltype(one);
    const int chunk = chunk_length(static_cast<int>(length));
    return Case::kD == channels && Case::kC == chunk && Case::kIsWhole == (chunk == length) &&
           (length % chunk == 0 || Case::kC == kPartialChunk);
  };
  return ((is(cases) && function(cases)) || ...);
}

// Call `function` with the case of a width and length; return what it returns, false if there is none.
template <typename Function>
bool with_cluster_case(int64_t channels, int64_t length, Function&& function) {
  return with_first_of(
      channels, length, std::forward<Function>(function), ClusterCase<224, 16, false>(), ClusterCase<288, 16, false>(),
      ClusterCase<320, 14, false>(), ClusterCase<320, 16, false>(), ClusterCase<384, 12, false>(),
      ClusterCase<448, 9, true>(), ClusterCase<512, 12, false>(), ClusterCase<512, 16, false>(),
      ClusterCase<544, 9, true>(), ClusterCase<544, 12, false>(), ClusterCase<544, 13, false>(),
      ClusterCase<544, 16, false>(), ClusterCase<544, 16, true>());
}

// Run the cluster kernel if there is one for the case, and the device has room for it. Returns whether it did.
template <typename T>
bool run_cluster(const ScanTensors& scan, const NormTensors& norm, Tensor& y, const Kept& kept) {
  const int64_t D = scan.channels, z_row = row_step(norm.z);
  const auto is_aligned = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % sizeof(float4) == 0;
  };
  if (scan.rank * 32 != D || scan.batch * scan.length * 2 * D > UINT32_MAX || row_step(scan.x) != D ||
      (z_row != D && z_row != 2 * D) || !is_aligned(scan.x) || !is_aligned(norm.z) || !is_aligned(scan.projection))
    return false;
  return with_cluster_case(D, scan.length, [&](auto one) {
    using Case = decltype(one);
    constexpr int kD = Case::kD, kC = Case::kC;
    constexpr bool kIsWhole = Case::kIsWhole;
    const auto kernel =
        z_row == kD ? cluster_kernel<T, kD, kC, kD, kIsWhole> : cluster_kernel<T, kD, kC, 2 * kD, kIsWhole>;
    const bool has_clusters = device_attribute(cudaDevAttrClusterLaunch);
    const int chunks = ceil_div<int>(scan.length, kC), slots = ClusterShape<kD>::kSlots;
    // Few chunks a slot need the least memory; clusters beyond the portable size may not find room.
    for (const unsigned largest : {has_clusters ? kPortableCluster : 1u, has_clusters ? 2 * kPortableCluster : 1u})
      for (int count = 1; fits_shared(ClusterLayout<kD, kC>::floats(count)); ++count) {
        const ClusterPlan plan{ceil_div(chunks, slots * count), count, num_states(static_cast<int>(scan.length))};
        if (static_cast<unsigned>(plan.blocks) > largest)
          continue;
        Launch how{
            dim3(plan.blocks), ClusterShape<kD>::kThreads, ClusterLayout<kD, kC>::floats(count),
            static_cast<unsigned>(plan.blocks)};
        const int clusters = num_clusters(kernel, how);
        if (clusters == 0)
          break;
        how.grid.y = std::min({clusters, static_cast<int>(scan.batch), kMostClusters});
        launch(kernel, how, scan.inputs<T>(), norm.inputs<T>(), plan, y.mutable_data_ptr<T>(), kept);
        return true;
      }
    return false;
  });
}

// y, and what a backward pass starts from if there is a place for it.
template <typename T>
void run(const ScanTensors& scan, const NormTensors& norm, Tensor& y, const Kept& kept) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (run_cluster<T>(scan, norm, y, kept))
      return;
  }
  with_rank(scan.rank, [&](auto blocks) {
    constexpr int NR = decltype(blocks)::value;
    if constexpr (sizeof(T) == sizeof(float) && 8 * NR <= kMaxFusedRank) {
      if (is_fused<NR>(scan)) {
        launch_fused<T, NR>(scan, norm, y, kept.statistics);
        return;
      }
    }
    Tensor sum = empty_floats({scan.batch, scan.length, scan.channels}, scan.x);
    run_split<T, NR>(scan, sum);
    run_norm<T>(sum, norm, y, kept.statistics);
  });
  if (kept.states)
    launch(states_kernel<T>, dim3(scan.batch, scan.groups(), 2), kLanes, 0, scan.inputs<T>(), kept.states);
}

Tensor run_any(
    const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    at::IntArrayRef reverse, const Kept& kept) {
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
      const Tensor sum = selective_scan_cuda(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
      run_norm<T>(sum, norm, y, kept.statistics);
      return;
    }
    const ScanTensors scan(x, type, projection, dt_weight, dt_bias, A_log, D_skip);
    run<T>(scan, norm, y, kept);
  });
  return y.to(x.scalar_type());
}

}  // namespace

Tensor gated_scan_cuda(
    const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    at::IntArrayRef reverse) {
  return run_any(x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias, eps, reverse, Kept{});
}

ScanWithStates gated_scan_with_states_cuda(
    const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    at::IntArrayRef reverse) {
  check_scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
  const int64_t length = is_special(dt_weight, A_log, reverse) ? x.size(1) : 0;
  const int count = num_states(static_cast<int>(length));
  const Tensor states = empty_floats({x.size(0), 2, count, x.size(2)}, x);
  const Tensor statistics = empty_floats({x.size(0), length, 2}, x);
  const Kept kept{
      count > 0 ? states.mutable_data_ptr<float>() : nullptr,
      length > 0 ? static_cast<float2*>(statistics.mutable_data_ptr()) : nullptr};
  return {
      run_any(x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias, eps, reverse, kept), states,
      statistics};
}

}  // namespace mobilemamba
