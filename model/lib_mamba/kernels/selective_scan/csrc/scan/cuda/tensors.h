// The tensors of a gated scan as its kernels take them, and which scans these kernels are made for.
#pragma once

#include <type_traits>

#include "scan/cuda/inputs.cuh"
#include "scan/cuda/launch.cuh"

namespace mobilemamba {

constexpr int kMaxRank = 64;

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

inline bool is_special(const Tensor& dt_weight, const Tensor& A_log, at::IntArrayRef reverse) {
  return reverse == at::IntArrayRef({0, 1}) && A_log.size(1) == 1 && dt_weight.size(2) <= kMaxRank;
}

inline void check_gate(const Tensor& x, const Tensor& z, const Tensor& norm_weight, const Tensor& norm_bias) {
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

inline at::ScalarType common_type(const Tensor& x, const Tensor& z, const Tensor& projection) {
  return c10::promoteTypes(c10::promoteTypes(x.scalar_type(), z.scalar_type()), projection.scalar_type());
}

}  // namespace mobilemamba
