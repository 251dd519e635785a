// Batch norms in training. In float32; maps are channels-last.
#include "cpu_norm.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

namespace mobilemamba {

using at::Tensor;

namespace {

// Mean and biased variance of every channel. The running ones move towards the mean and the unbiased variance.
std::tuple<Tensor, Tensor> moments(
    const Tensor& x, const Tensor& running_mean, const Tensor& running_var, double momentum) {
  const Tensor map = as_rows(x);
  const int64_t C = map.size(1), rows = num_rows(map);
  const Pieces pieces = pieces_of(rows, C);
  const Tensor partial = floats(2 * pieces.count * C), mean = floats(C), var = floats(C);
  check_vector(running_mean, C, "running_mean");
  check_vector(running_var, C, "running_var");
  float *means = partial.mutable_data_ptr<float>(), *squares = means + pieces.count * C;
  const Kernels& kernel = kernels();
  for_pieces(pieces, kBackwards, [&](int64_t i) {
    kernel.moments(matrix_of(map).from(pieces.begin(i)), pieces.size(i), C, means + i * C, squares + i * C);
  });
  // Variances of the pieces and distances between their means add up without cancellation.
  std::vector<double> centre(C), spread(C);
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < C; ++c)
      centre[c] += static_cast<double>(means[i * C + c]) * pieces.size(i) / rows;
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < C; ++c) {
      const double distance = means[i * C + c] - centre[c];
      spread[c] += squares[i * C + c] + distance * distance * pieces.size(i);
    }
  float *to_mean = mean.mutable_data_ptr<float>(), *to_var = var.mutable_data_ptr<float>();
  float *old_mean = running_mean.mutable_data_ptr<float>(), *old_var = running_var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    to_mean[c] = static_cast<float>(centre[c]);
    to_var[c] = static_cast<float>(spread[c] / rows);
    old_mean[c] += static_cast<float>(momentum * (centre[c] - old_mean[c]));
    old_var[c] += static_cast<float>(momentum * (spread[c] / (rows - 1) - old_var[c]));
  }
  return {mean, var};
}

}  // namespace

NormGradient::NormGradient(const Statistics& statistics, Activation activation)
    : scale(floats(statistics.mean.numel())), offset(floats(scale.numel())), slope(floats(scale.numel())),
      dweight(floats(scale.numel())), dbias(floats(scale.numel())),
      n(statistics.normalization(scale.mutable_data_ptr<float>(), activation)) {}

void NormGradient::set(const Statistics& statistics, const Tensor& sums, int64_t rows) {
  const int64_t C = n.channels;
  TORCH_CHECK(
      sums.scalar_type() == at::kDouble && sums.is_contiguous() && sums.numel() == 2 * C, "sums must be (2, ", C,
      ") in float64, got ", sums.sizes());
  const double *sum = sums.const_data_ptr<double>(), *product = sum + C;
  float *to_offset = offset.mutable_data_ptr<float>(), *to_slope = slope.mutable_data_ptr<float>();
  float *to_weight = dweight.mutable_data_ptr<float>(), *to_bias = dbias.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    const double rstd = statistics.rstd(c);
    to_bias[c] = static_cast<float>(sum[c]);
    to_weight[c] = static_cast<float>(product[c] * rstd);
    to_offset[c] = static_cast<float>(-n.scale[c] * sum[c] / rows);
    to_slope[c] = static_cast<float>(-n.scale[c] * product[c] * rstd * rstd / rows);
  }
}

Tensor add_pieces(const Pieces& pieces, int64_t channels, const float* sums, const float* products) {
  const Tensor total = at::zeros({2, channels}, at::TensorOptions(at::kDouble));
  double *sum = total.mutable_data_ptr<double>(), *product = sum + channels;
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += sums[i * channels + c];
      product[c] += products[i * channels + c];
    }
  return total;
}

Tensor sums_of(const Normalization& n, const Tensor& grad, const Tensor& map) {
  const int64_t C = n.channels;
  const Pieces pieces = pieces_of(num_rows(map), C);
  const Tensor partial = floats(2 * pieces.count * C);
  float *sums = partial.mutable_data_ptr<float>(), *products = sums + pieces.count * C;
  for_pieces(pieces, kBackwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernels().normalize_sums(
        n, matrix_of(grad).from(row), matrix_of(map).from(row), pieces.size(i), sums + i * C, products + i * C);
  });
  return add_pieces(pieces, C, sums, products);
}

void check_same(const Tensor& tensor, const Tensor& map, const char* name) {
  TORCH_CHECK(tensor.sizes() == map.sizes(), name, " must be ", map.sizes(), ", got ", tensor.sizes());
}

Tensor normalize(
    const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& bias, double eps,
    int64_t activation, const std::optional<Tensor>& residual) {
  const Tensor map = as_rows(x), added = residual ? as_rows(*residual) : Tensor();
  const int64_t C = map.size(1);
  const Statistics statistics{mean, var, weight, bias, eps};
  statistics.check(C);
  if (residual)
    check_same(added, map, "residual");
  const Tensor out = new_map(map.size(0), C, map.size(2), map.size(3)), scale = floats(C);
  const Normalization n = statistics.normalization(scale.mutable_data_ptr<float>(), activation_of(activation));
  const Matrix from = matrix_of(map), to = matrix_of(out), below = residual ? matrix_of(added) : Matrix{};
  const Kernels& kernel = kernels();
  const Pieces pieces = pieces_of(num_rows(map), C);
  for_pieces(pieces, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernel.normalize(n, from.from(row), below.from(row), to.from(row), pieces.size(i));
  });
  return out;
}

std::tuple<Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
    const Tensor& bias, double eps, int64_t activation, const std::optional<Tensor>& sums, const Tensor& out) {
  const Tensor map = as_rows(x), gradient = as_rows(grad);
  const Statistics statistics{mean, var, weight, bias, eps};
  statistics.check(map.size(1));
  check_same(gradient, map, "grad");
  check_same(out, map, "out");
  TORCH_CHECK(as_rows(out).is_same(out), "out must be channels-last");
  NormGradient g(statistics, activation_of(activation));
  g.set(statistics, sums ? *sums : sums_of(g.n, gradient, map), num_rows(map));
  const Pieces pieces = pieces_of(num_rows(map), map.size(1));
  for_pieces(pieces, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernels().normalize_backward(
        g.n, g.offset.const_data_ptr<float>(), g.slope.const_data_ptr<float>(), matrix_of(gradient).from(row),
        matrix_of(map).from(row), matrix_of(out).from(row), pieces.size(i));
  });
  return {g.dweight, g.dbias};
}

}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("moments", mobilemamba::moments);
  m.impl("normalize", mobilemamba::normalize);
  m.impl("normalize_backward", mobilemamba::normalize_backward);
}
