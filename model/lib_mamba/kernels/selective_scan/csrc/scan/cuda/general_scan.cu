// The scan in any directions with up to 16 state components, on the GPU.
#include "scan/cuda/general_scan.cuh"
#include "scan/cuda/launch.cuh"

namespace mobilemamba {
namespace {

// Call `function` with the number of state components rounded up to a power of two, as a constant.
template <typename Function>
void with_states(int64_t num_states, Function&& function) {
  if (num_states == 1)
    function(std::integral_constant<int, 1>());
  else if (num_states == 2)
    function(std::integral_constant<int, 2>());
  else if (num_states <= 4)
    function(std::integral_constant<int, 4>());
  else if (num_states <= 8)
    function(std::integral_constant<int, 8>());
  else
    function(std::integral_constant<int, 16>());
}

// The arguments as the kernels take them, and the tensors that keep them alive.
struct GeneralTensors {
  at::ScalarType type;
  Tensor x, projection, dt_weight, dt_bias, A_log, D_skip;
  int64_t batch, length, channels, rank, directions, states, reverse = 0;

  GeneralTensors(
      const Tensor& x_, const Tensor& projection_, const Tensor& dt_weight_, const Tensor& dt_bias_,
      const Tensor& A_log_, const Tensor& D_skip_, at::IntArrayRef reverse_)
      : type(c10::promoteTypes(x_.scalar_type(), projection_.scalar_type())),
        x(as_rows(x_, type)),
        projection(projection_.to(type).contiguous()),
        dt_weight(as_floats(dt_weight_.transpose(1, 2))),
        dt_bias(as_floats(dt_bias_)),
        A_log(as_floats(A_log_)),
        D_skip(as_floats(D_skip_)),
        batch(x_.size(0)),
        length(x_.size(1)),
        channels(x_.size(2)),
        rank(dt_weight_.size(2)),
        directions(dt_weight_.size(0)),
        states(A_log_.size(1)) {
    TORCH_CHECK(states >= 1 && states <= kMaxStates, "A_log must have 1 to ", kMaxStates, " states, got ", states);
    TORCH_CHECK(directions < 64, "dt_weight may have up to 63 directions, got ", directions);
    for (int64_t k = 0; k < directions; ++k)
      reverse |= static_cast<int64_t>(reverse_[k] != 0) << k;
  }

  template <typename T>
  GeneralInputs<T> inputs() const {
    GeneralInputs<T> p{};
    p.x = x.const_data_ptr<T>();
    p.x_row = row_step(x);
    p.projection = projection.const_data_ptr<T>();
    p.dt_weight = dt_weight.const_data_ptr<float>();
    p.dt_bias = dt_bias.const_data_ptr<float>();
    p.A_log = A_log.const_data_ptr<float>();
    p.D_skip = D_skip.const_data_ptr<float>();
    p.reverse = reverse;
    p.batch = static_cast<int>(batch);
    p.length = static_cast<int>(length);
    p.channels = static_cast<int>(channels);
    p.rank = static_cast<int>(rank);
    p.directions = static_cast<int>(directions);
    p.states = static_cast<int>(states);
    return p;
  }

  // Positions of a chunk, as the kernels cut the sequence.
  int64_t chunk() const {
    int positions = 0;
    with_states(states, [&](auto number) { positions = general_chunk(decltype(number)::value); });
    return positions;
  }
  int blocks() const { return static_cast<int>(ceil_div<int64_t>(channels, kGeneralThreads)); }

  // Run a kernel; `is_backward` if it also makes gradients.
  void run(const GeneralOutputs& outputs, bool is_backward) const {
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      with_states(states, [&](auto number) {
        constexpr int N = decltype(number)::value;
        const int shared = general_shared_floats(static_cast<int>(rank + 2 * states), N, is_backward);
        TORCH_CHECK(fits_shared(shared), "dt_weight has a rank of ", rank, ", too large for the kernel");
        const auto kernel = is_backward ? general_backward_kernel<T, N> : general_kernel<T, N>;
        launch(kernel, dim3(batch, blocks()), kGeneralThreads, shared, inputs<T>(), outputs);
      });
    });
  }
};

}  // namespace

Tensor selective_scan_cuda(
    const Tensor& x, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
    const Tensor& D_skip, at::IntArrayRef reverse) {
  check_scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor y = empty_floats(x.sizes(), x);
  if (x.numel() == 0)
    return y;
  const GeneralTensors scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
  GeneralOutputs outputs{};
  outputs.y = y.mutable_data_ptr<float>();
  scan.run(outputs, false);
  return y;
}

ScanGradients selective_scan_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, at::IntArrayRef reverse) {
  check_scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
  TORCH_CHECK(grad.sizes() == x.sizes(), "grad must have the shape of x, ", x.sizes(), ", got ", grad.sizes());
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0)
    return {
        x.new_zeros(x.sizes()),
        projection.new_zeros(projection.sizes()),
        dt_weight.new_zeros(dt_weight.sizes()),
        dt_bias.new_zeros(dt_bias.sizes()),
        A_log.new_zeros(A_log.sizes()),
        D_skip.new_zeros(D_skip.sizes())};
  const GeneralTensors scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse);
  const int64_t B = scan.batch, L = scan.length, D = scan.channels, R = scan.rank, K = scan.directions;
  const int64_t N = scan.states;
  const Tensor dy = as_floats(grad);
  Tensor dx = empty_floats({B, L, D}, dy);
  Tensor dprojection = empty_floats({scan.blocks(), B, L, K * (R + 2 * N)}, dy);
  Tensor ddt_weight = empty_floats({B, K, R, D}, dy);
  Tensor dchannel = empty_floats({B, K, N + 2, D}, dy);
  Tensor checkpoints = empty_floats({B, K, ceil_div(L, scan.chunk()), N, D}, dy);
  GeneralOutputs outputs{};
  outputs.checkpoints = checkpoints.mutable_data_ptr<float>();
  scan.run(outputs, false);
  outputs.dy = dy.const_data_ptr<float>();
  outputs.dx = dx.mutable_data_ptr<float>();
  outputs.dprojection = dprojection.mutable_data_ptr<float>();
  outputs.ddt_weight = ddt_weight.mutable_data_ptr<float>();
  outputs.dchannel = dchannel.mutable_data_ptr<float>();
  scan.run(outputs, true);
  const Tensor sums = dchannel.sum(0);  // (K, N + 2, D)
  return {
      dx.to(x.scalar_type()),
      dprojection.sum(0).to(projection.scalar_type()),
      copy_of(ddt_weight.sum(0).transpose(1, 2)).to(dt_weight.scalar_type()),
      copy_of(sums.select(1, N)).to(dt_bias.scalar_type()),
      copy_of(sums.narrow(1, 0, N).transpose(1, 2)).view({K * D, N}).to(A_log.scalar_type()),
      copy_of(sums.select(1, N + 1)).view({K * D}).to(D_skip.scalar_type())};
}

}  // namespace mobilemamba
