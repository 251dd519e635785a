// The gated scan on the GPU: which kernels, how many blocks, and the sums over the blocks' results.
//
// The kernels are made for two directions, forward and backward, with one state component (gated_scan_*.cuh). Any other
// scan runs on general_scan.cu, with normalisation and gate after it.
#include <algorithm>

#include "scan/cuda/gated_scan_backward.cuh"
#include "scan/cuda/gated_scan_fused.cuh"
#include "scan/cuda/gated_scan_split.cuh"
#include "scan/cuda/launch.cuh"
#include "scan/cuda/norm.cuh"

namespace mobilemamba {
namespace {

constexpr int kMaxRank = 64;
constexpr int kMaxFusedRank = 32;
constexpr int kMaxFusedLength = 64;  // up to here one block is enough for an image, however few images there are
constexpr int kNormThreads = 256;

// Call `function` with the number of blocks of 8 that hold a rank, as a constant.
template <typename Function>
void with_rank(int64_t rank, Function&& function) {
  if (rank <= 8)
    function(std::integral_constant<int, 1>());
  else if (rank <= 16)
    function(std::integral_constant<int, 2>());
  else if (rank <= 24)
    function(std::integral_constant<int, 3>());
  else if (rank <= 32)
    function(std::integral_constant<int, 4>());
  else
    function(std::integral_constant<int, 8>());
}

bool is_special(const Tensor& dt_weight, const Tensor& A_log, at::IntArrayRef reverse) {
  return reverse == at::IntArrayRef({0, 1}) && A_log.size(1) == 1 && dt_weight.size(2) <= kMaxRank;
}

void check_gate(const Tensor& x, const Tensor& z, const Tensor& norm_weight, const Tensor& norm_bias) {
  TORCH_CHECK(z.sizes() == x.sizes(), "z must have the shape of x, ", x.sizes(), ", got ", z.sizes());
  const at::IntArrayRef shape = x.sizes().slice(2);
  TORCH_CHECK(norm_weight.sizes() == shape, "norm_weight must be (D,) = ", shape, ", got ", norm_weight.sizes());
  TORCH_CHECK(norm_bias.sizes() == shape, "norm_bias must be (D,) = ", shape, ", got ", norm_bias.sizes());
  for (const Tensor& tensor : {z, norm_weight, norm_bias})
    TORCH_CHECK(tensor.device() == x.device(), "all tensors must be on ", x.device(), ", one is on ", tensor.device());
}

// The tensors of a scan as the kernels take them.
struct ScanTensors {
  at::ScalarType type;
  Tensor x, projection, dt_weight, dt_bias, A_log, D_skip;
  int64_t batch, length, channels, rank;

  ScanTensors(
      const Tensor& x_, at::ScalarType type_, const Tensor& projection_, const Tensor& dt_weight_,
      const Tensor& dt_bias_, const Tensor& A_log_, const Tensor& D_skip_)
      : type(type_),
        x(as_rows(x_, type)),
        projection(projection_.to(type).contiguous()),
        dt_weight(as_floats(dt_weight_)),
        dt_bias(as_floats(dt_bias_)),
        A_log(as_floats(A_log_)),
        D_skip(as_floats(D_skip_)),
        batch(x_.size(0)),
        length(x_.size(1)),
        channels(x_.size(2)),
        rank(dt_weight_.size(2)) {}

  template <typename T>
  ScanInputs<T> inputs() const {
    ScanInputs<T> p{};
    p.x = x.const_data_ptr<T>();
    p.x_row = row_step(x);
    p.projection = projection.const_data_ptr<T>();
    p.dt_weight = dt_weight.const_data_ptr<float>();
    p.dt_bias = dt_bias.const_data_ptr<float>();
    p.A_log = A_log.const_data_ptr<float>();
    p.D_skip = D_skip.const_data_ptr<float>();
    p.batch = static_cast<int>(batch);
    p.length = static_cast<int>(length);
    p.channels = static_cast<int>(channels);
    p.rank = static_cast<int>(rank);
    return p;
  }

  int groups() const { return static_cast<int>(ceil_div<int64_t>(channels, kLanes)); }
  int chunks() const { return static_cast<int>(ceil_div<int64_t>(length, kChunk)); }
};

struct NormTensors {
  Tensor z, weight, bias;
  float eps;

  NormTensors(const Tensor& z_, at::ScalarType type, const Tensor& weight_, const Tensor& bias_, double eps_)
      : z(as_rows(z_, type)), weight(as_floats(weight_)), bias(as_floats(bias_)), eps(static_cast<float>(eps_)) {}

  template <typename T>
  NormInputs<T> inputs() const {
    return {z.const_data_ptr<T>(), row_step(z), weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), eps};
  }
};

// One block an image: where there are images enough to fill the GPU, or little to do in each.
template <int NR>
bool is_fused(const ScanTensors& scan, bool is_backward) {
  const bool is_enough = 2 * scan.batch >= num_multiprocessors() || scan.length <= kMaxFusedLength;
  return is_enough && scan.groups() * kLanes <= kFusedThreads && scan.rank <= kMaxFusedRank &&
         fits_shared(fused_shared_floats<NR>(scan.groups(), is_backward));
}

// How the work of a kernel is divided into blocks of channels and segments of positions.
struct Plan {
  int groups, segments, blocks;

  // As many channels in a block as there are warps, or one warp's for each of many segments where blocks are few.
  template <typename SharedFloats>
  Plan(const ScanTensors& scan, int max_groups, int max_segments, SharedFloats&& shared_floats) {
    blocks = ceil_div(scan.groups(), max_groups);
    groups = ceil_div(scan.groups(), blocks);
    segments = 1;
    if (scan.batch * blocks < num_multiprocessors() && scan.chunks() > 1) {
      groups = 1;
      segments = std::min(max_segments, scan.chunks());
    }
    while (!fits_shared(shared_floats(groups, segments)))
      (segments > 1 ? segments : groups) /= 2;
    segments = ceil_div(scan.chunks(), ceil_div(scan.chunks(), segments));  // none of them empty
    blocks = ceil_div(scan.groups(), groups);
  }

  int threads() const { return groups * segments * kLanes; }
};

// The sum of both directions, and if asked for, the checkpoints that the backward pass starts from.
template <typename T, int NR>
void run_split(const ScanTensors& scan, Tensor& sum, float* checkpoints) {
  const auto shared_floats = [](int groups, int segments) { return split_shared_floats<NR>(groups, segments); };
  const Plan plan(scan, 8, kSplitThreads / kLanes, shared_floats);
  launch(
      split_kernel<T, NR>, dim3(scan.batch, plan.blocks), plan.threads(), shared_floats(plan.groups, plan.segments),
      scan.inputs<T>(), plan.segments, sum.mutable_data_ptr<float>(), checkpoints);
}

template <typename T>
void run_norm(const Tensor& sum, const NormTensors& norm, Tensor& y) {
  const int64_t rows = norm.z.size(0);
  constexpr int kRows = kNormThreads / kLanes;
  launch(
      norm_gate_kernel<T>, dim3(ceil_div<int64_t>(rows, kRows)), kNormThreads, 0, sum.const_data_ptr<float>(),
      norm.inputs<T>(), rows, static_cast<int>(norm.z.size(1)), y.mutable_data_ptr<T>());
}

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

template <typename T, int NR, bool kBackward>
void launch_fused(const ScanTensors& scan, const NormTensors& norm, const FusedOutputs<T>& outputs) {
  const int threads = scan.groups() * kLanes;
  auto kernel = fused_kernel<T, NR, kBackward, kFusedThreads>;
  if constexpr (sizeof(T) < sizeof(float)) {
    if (threads > kRoomyThreads && threads <= kSharingThreads)
      kernel = fused_kernel<T, NR, kBackward, kSharingThreads>;
  }
  launch(
      kernel, dim3(scan.batch), threads, fused_shared_floats<NR>(scan.groups(), kBackward), scan.inputs<T>(),
      norm.inputs<T>(), outputs);
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

at::ScalarType common_type(const Tensor& x, const Tensor& z, const Tensor& projection) {
  return c10::promoteTypes(c10::promoteTypes(x.scalar_type(), z.scalar_type()), projection.scalar_type());
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

GatedGradients gated_scan_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight,
    const Tensor& dt_bias, const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight,
    const Tensor& norm_bias, double eps, at::IntArrayRef reverse) {
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
