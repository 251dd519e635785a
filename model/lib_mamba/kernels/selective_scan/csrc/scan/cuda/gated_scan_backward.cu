// The gradients of the gated scan on the GPU: which kernels, and how many blocks.
//
// Three launches where a block of threads holds what an image needs, four for longer images: the parameters in the
// order in which lanes read them; how gradients pass through the blocks of an image; the gradients; and the sums over
// blocks.
#include "scan/cuda/gated_scan_backward.cuh"

#include <algorithm>
#include <climits>
#include <cstdint>

#include "scan/cuda/chunks.h"
#include "scan/cuda/norm.cuh"
#include "scan/cuda/tensors.h"

namespace mobilemamba {
namespace {

constexpr int kNormThreads = 256;
constexpr int kLargestCluster = 16;

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

AnyFloats any_floats(const Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
      "parameters must be float32, float16 or bfloat16, got ", type);
  const auto own = type == at::kFloat ? AnyFloats::kFloat : type == at::kHalf ? AnyFloats::kHalf : AnyFloats::kBFloat16;
  return {const_cast<void*>(tensor.const_data_ptr()), own};
}

// The parameters, from dt_weight on, or their gradients.
struct ParameterTensors {
  Tensor dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias;

  AnyParameters pointers() const {
    return {
        any_floats(dt_weight),
        any_floats(dt_bias),
        any_floats(A_log),
        any_floats(D_skip),
        any_floats(norm_weight),
        any_floats(norm_bias),
        static_cast<int>(dt_weight.size(1)),
        static_cast<int>(dt_weight.size(2))};
  }
  ParameterTensors contiguous() const {
    return {dt_weight.contiguous(), dt_bias.contiguous(),     A_log.contiguous(),
            D_skip.contiguous(),    norm_weight.contiguous(), norm_bias.contiguous()};
  }
  static Tensor empty(const Tensor& like) { return at::empty(like.sizes(), like.options()); }
  ParameterTensors gradients() const {
    return {empty(dt_weight), empty(dt_bias), empty(A_log), empty(D_skip), empty(norm_weight), empty(norm_bias)};
  }
};

// Rows that can be read two channels at a time.
Tensor as_pair_rows(const Tensor& tensor, at::ScalarType type) {
  const Tensor rows = as_rows(tensor, type);
  const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
  const bool is_aligned = address % (2 * rows.element_size()) == 0 && row_step(rows) % 2 == 0;
  return is_aligned ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

// How sequences are divided for a kernel with chunks of up to `chunk` positions.
struct Division {
  int states, step, blocks;
  bool are_independent, is_possible;

  Division(int length, int chunk)
      : states(num_states(length)),
        step(length <= chunk ? length : chunk_length(length)),
        blocks(states > 0 ? ceil_div(states, kBlockChunks) : 1),
        are_independent(length <= chunk),
        is_possible(are_independent || (states > 0 && step <= chunk)) {}
};

int num_groups(int64_t channels) {
  return static_cast<int>(ceil_div<int64_t>(channels, kGroup));
}

template <typename T, int NR_, int kChunk_, int kChannels_ = 0>
struct Instance {
  using Element = T;
  static constexpr int NR = NR_, kChunk = kChunk_, kChannels = kChannels_;
  using Warp = BackwardWarp<T, NR, kChunk, kChannels>;
  using Shared = typename Warp::Shared;

  static constexpr auto kernel() { return scan_backward_kernel<T, NR, kChunk, kChannels>; }
};

// Call `function` with the instance of the kernel for these sequences; return whether there is one.
template <typename T, typename Function>
bool with_instance(const BackwardArguments<T>& p, Function&& function) {
  const int64_t padded_rows = static_cast<int64_t>(p.batch) * p.length + kBlockChunks * kTileRows;
  const auto can_run = [&](auto instance) {
    using Own = decltype(instance);
    const Division division(p.length, Own::kChunk);
    if (p.rank > 8 * Own::NR || !division.is_possible ||
        !fits_shared(Own::Shared::floats(num_groups(p.channels), Own::kChannels > 0)))
      return false;
    if (Own::kChannels == 0)
      return true;
    const bool is_width = p.channels == Own::kChannels && p.x_row == p.channels && p.grad_row == p.channels &&
                          p.rank == ceil_div(p.channels, 32);
    const bool is_length = division.step == Own::kChunk && (Own::Warp::kMayEndEarly || p.length % Own::kChunk == 0);
    const int64_t row = std::max(p.z_row, 2 * p.channels);
    return is_width && is_length && padded_rows * row <= UINT32_MAX &&
           (division.blocks == 1 || !is_block_an_image(Own::kChannels)) &&
           (division.are_independent || !is_chunk_an_image(Own::kChannels, Own::kChunk));
  };
  if (p.channels % 2 != 0 || num_groups(p.channels) > kMaxBackwardWarps || padded_rows > INT_MAX)
    return false;
  const auto try_all = [&](auto... instances) { return ((can_run(instances) && (function(instances), true)) || ...); };
  if constexpr (sizeof(T) == sizeof(float))
    return try_all(Instance<T, 3, 16>());
  else
    return try_all(
        Instance<T, 1, 16, 224>(), Instance<T, 2, 16, 288>(), Instance<T, 2, 14, 320>(), Instance<T, 2, 16, 320>(),
        Instance<T, 2, 12, 384>(), Instance<T, 2, 9, 448>(), Instance<T, 2, 12, 512>(), Instance<T, 2, 16, 512>(),
        Instance<T, 3, 9, 544>(), Instance<T, 3, 12, 544>(), Instance<T, 3, 13, 544>(), Instance<T, 3, 16, 544>(),
        Instance<T, 2, 16>(), Instance<T, 3, 16>());
}

// What the forward pass keeps.
struct KeptTensors {
  Tensor states, statistics;
};

// As given; where anything is missing, the forward pass runs again.
KeptTensors kept_of(
    const Tensor& x, const Tensor& z, const Tensor& projection, const ParameterTensors& p, double eps,
    at::IntArrayRef reverse, const std::optional<Tensor>& states, const std::optional<Tensor>& statistics) {
  const int64_t count = num_states(static_cast<int>(x.size(1)));
  const std::vector<int64_t> states_shape{x.size(0), 2, count, x.size(2)}, statistics_shape{x.size(0), x.size(1), 2};
  const auto is_given = [](const std::optional<Tensor>& tensor) { return tensor && tensor->numel() > 0; };
  if (!is_given(statistics) || (count > 0 && !is_given(states))) {
    auto [y, own_states, own_statistics] = gated_scan_with_states_cuda(
        x, z, projection, p.dt_weight, p.dt_bias, p.A_log, p.D_skip, p.norm_weight, p.norm_bias, eps, reverse);
    return {own_states, own_statistics};
  }
  TORCH_CHECK(
      count == 0 || states->sizes() == states_shape, "states must be (B, 2, count, D) = ", states_shape, ", got ",
      states->sizes());
  TORCH_CHECK(
      statistics->sizes() == statistics_shape, "statistics must be (B, L, 2) = ", statistics_shape, ", got ",
      statistics->sizes());
  return {count > 0 ? as_floats(*states) : empty_floats(states_shape, x), as_floats(*statistics)};
}

template <typename Instance>
void run_instance(
    BackwardArguments<typename Instance::Element> arguments, const ParameterTensors& parameters,
    const ParameterTensors& gradients, const Tensor& like) {
  using Shared = typename Instance::Shared;
  using Warp = typename Instance::Warp;
  const Division division(arguments.length, Instance::kChunk);
  const int groups = num_groups(arguments.channels);
  const bool is_parked_here = fits_shared(Shared::floats(groups, true));
  const int shared_floats = Shared::floats(groups, is_parked_here);
  // A cluster of blocks for an image, where there is one; otherwise gradients pass through memory between two launches.
  Launch how{dim3(division.blocks), groups * kLanes, shared_floats, static_cast<unsigned>(division.blocks)};
  int64_t places = 0;
  if (division.blocks > 1 && division.blocks <= kLargestCluster && device_attribute(cudaDevAttrClusterLaunch))
    places = static_cast<int64_t>(num_clusters(Instance::kernel(), how)) * division.blocks;
  const bool is_whole = places > 0 || division.blocks == 1;
  if (places == 0) {
    how.cluster = 1;
    places = std::max(num_clusters(Instance::kernel(), how), 1);
  }
  const int64_t items = division.are_independent ? ceil_div<int64_t>(arguments.batch, kBlockChunks)
                                                 : static_cast<int64_t>(arguments.batch) * division.blocks;
  const int64_t blocks = std::min(items, places);
  arguments.items = static_cast<int>(items);
  how.grid = dim3(blocks);

  const Tensor prepared = empty_floats({groups, GroupLayout<Instance::NR>::kFloats}, like);
  launch(
      prepare_kernel<typename Instance::Element, Instance::NR>, dim3(groups), kParameterThreads, 0,
      parameters.pointers(), Warp::kHasOnes, prepared.mutable_data_ptr<float>());

  const ShareLayout layout{Instance::NR, Warp::kHasOnes};
  const Tensor shares = empty_floats({blocks, groups, layout.group()}, like);
  const Tensor passages =
      empty_floats({division.blocks > 1 ? arguments.batch : 0, 2, division.blocks, groups * kLanes, 4}, like);
  const Tensor parked = empty_floats({is_parked_here ? 0 : blocks, groups, Shared::kParkedFloats}, like);
  arguments.prepared = prepared.const_data_ptr<float>();
  arguments.shares = shares.mutable_data_ptr<float>();
  arguments.passages = static_cast<PassagePair*>(passages.mutable_data_ptr());
  arguments.parked = is_parked_here ? nullptr : parked.mutable_data_ptr<float>();
  arguments.step = division.step;
  arguments.blocks = division.blocks;
  arguments.image_states = division.states;
  arguments.are_independent = division.are_independent;
  const auto run = [&](Part part) {
    arguments.part = part;
    launch(Instance::kernel(), how, arguments);
  };
  if (!is_whole)
    run(Part::kPassages);
  run(is_whole ? Part::kWhole : Part::kGradients);

  launch(
      add_kernel, dim3(layout.group() / kLanes, groups), kParameterThreads, kParameterThreads,
      shares.const_data_ptr<float>(), static_cast<int>(blocks), layout, gradients.pointers());
}

// With all channels in a block of threads, if they fit: whether they did.
template <typename T>
bool grouped_backward(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& projection, const ParameterTensors& given,
    double eps, at::IntArrayRef reverse, const std::optional<Tensor>& states, const std::optional<Tensor>& statistics,
    at::ScalarType type, GatedGradients& results) {
  const Tensor x_rows = as_pair_rows(x, type), z_rows = as_pair_rows(z, type), grad_rows = as_pair_rows(grad, type);
  BackwardArguments<T> arguments{};
  arguments.x = x_rows.const_data_ptr<T>(), arguments.x_row = row_step(x_rows);
  arguments.z = z_rows.const_data_ptr<T>(), arguments.z_row = row_step(z_rows);
  arguments.grad = grad_rows.const_data_ptr<T>(), arguments.grad_row = row_step(grad_rows);
  arguments.batch = static_cast<int>(x.size(0));
  arguments.length = static_cast<int>(x.size(1));
  arguments.channels = static_cast<int>(x.size(2));
  arguments.rank = static_cast<int>(given.dt_weight.size(2));
  return with_instance<T>(arguments, [&](auto instance) {
    const ParameterTensors parameters = given.contiguous(), gradients = parameters.gradients();
    const Tensor own_projection = as_pair_rows(projection.contiguous(), type);
    const KeptTensors kept = kept_of(x, z, projection, parameters, eps, reverse, states, statistics);
    Tensor dx = at::empty(x.sizes(), x.options().dtype(type)), dz = at::empty(z.sizes(), z.options().dtype(type));
    Tensor dprojection = at::empty(projection.sizes(), projection.options().dtype(type));
    arguments.projection = own_projection.const_data_ptr<T>();
    arguments.states = kept.states.const_data_ptr<float>();
    arguments.statistics = static_cast<const float2*>(kept.statistics.const_data_ptr());
    arguments.dx = dx.mutable_data_ptr<T>();
    arguments.dz = dz.mutable_data_ptr<T>();
    arguments.dprojection = dprojection.mutable_data_ptr<T>();
    run_instance<decltype(instance)>(arguments, parameters, gradients, x);
    results = {dx.to(x.scalar_type()), dz.to(z.scalar_type()), dprojection.to(projection.scalar_type()),
               gradients.dt_weight,    gradients.dt_bias,      gradients.A_log,
               gradients.D_skip,       gradients.norm_weight,  gradients.norm_bias};
  });
}

// Any other scan: the sum of its directions in memory.
template <typename T>
GatedGradients general_backward(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& projection, const ParameterTensors& p,
    double eps, at::IntArrayRef reverse, at::ScalarType type) {
  const NormTensors norm(z, type, p.norm_weight, p.norm_bias, eps);
  Tensor dz = at::empty(z.sizes(), z.options().dtype(type));
  Tensor sum = selective_scan_cuda(x, projection, p.dt_weight, p.dt_bias, p.A_log, p.D_skip, reverse);
  const Tensor dnorms = run_norm_backward<T>(as_rows(grad, type), sum, norm, dz).sum(0);
  const auto [dx, dprojection, ddt_weight, ddt_bias, dA_log, dD_skip] =
      selective_scan_backward_cuda(sum, x, projection, p.dt_weight, p.dt_bias, p.A_log, p.D_skip, reverse);
  return {
      dx.to(x.scalar_type()),
      dz.to(z.scalar_type()),
      dprojection.to(projection.scalar_type()),
      ddt_weight.to(p.dt_weight.scalar_type()),
      ddt_bias.to(p.dt_bias.scalar_type()),
      dA_log.to(p.A_log.scalar_type()),
      dD_skip.to(p.D_skip.scalar_type()),
      copy_of(dnorms.select(0, 0)).to(p.norm_weight.scalar_type()),
      copy_of(dnorms.select(0, 1)).to(p.norm_bias.scalar_type())};
}

}  // namespace

GatedGradients gated_scan_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight,
    const Tensor& dt_bias, const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight,
    const Tensor& norm_bias, double eps, at::IntArrayRef reverse, const std::optional<Tensor>& states,
    const std::optional<Tensor>& statistics) {
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
  const ParameterTensors parameters{dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias};
  GatedGradients gradients;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (!is_special(dt_weight, A_log, reverse) ||
        !grouped_backward<T>(grad, x, z, projection, parameters, eps, reverse, states, statistics, type, gradients))
      gradients = general_backward<T>(grad, x, z, projection, parameters, eps, reverse, type);
  });
  return gradients;
}

}  // namespace mobilemamba
