// Batch normalisation on one batch, and its gradients. Sums are made in an order that does not depend on the number of
// threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/share.h"
#include "layers/layers.h"
#include "layers/maps.h"

namespace mobilemamba {
namespace {

using at::Tensor;

// Rows are cut into pieces of about this many floats, which stay in the cache from one pass to the next. Threads run
// backwards over rows that were just written or read forwards, and the other way round: the last of them are still in
// the cache.
constexpr int64_t kPiece = 1 << 15;

Pieces pieces_of(int64_t rows, int64_t channels) {
  return Pieces::for_any_threads(rows, rows * channels / kPiece);
}

// Memory of this thread, kept from one norm to the next.
float* partial_sums(int64_t count) {
  static thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < count)
    kept.resize(count);
  return kept.data();
}

void check_out(const Tensor& out, const Tensor& map) {
  check_same(out, map, "out");
  TORCH_CHECK(as_rows(out).is_same(out), "out must be channels-last");
}

}  // namespace

void Norm::check(int64_t channels) const {
  TORCH_CHECK(
      statistics.dim() == 2 && statistics.size(1) == channels && statistics.stride(1) == 1, "statistics must be (2, ",
      channels, "), got ", statistics.sizes());
  check_vector(weight, channels, "a norm's weight");
  check_vector(bias, channels, "a norm's bias");
}

Normalization Norm::normalization(float* scale, Activation activation) const {
  const int64_t C = weight.numel();
  const float *mean = statistics.const_data_ptr<float>(), *rstd = mean + statistics.stride(0);
  const float* factor = weight.const_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c)
    scale[c] = factor[c] * rstd[c];
  return {C, mean, scale, bias.const_data_ptr<float>(), activation};
}

Norm Norm::measure(
    const Tensor& x, const Tensor& running_mean, const Tensor& running_var, double momentum, const Tensor& weight,
    const Tensor& bias, double eps) {
  const Tensor map = as_rows(x);
  const int64_t C = map.size(1), rows = num_rows(map);
  const Pieces pieces = pieces_of(rows, C);
  const Tensor statistics = at::empty({2, C}, at::TensorOptions(at::kFloat));
  check_vector(running_mean, C, "running_mean");
  check_vector(running_var, C, "running_var");
  float *means = partial_sums(2 * pieces.count * C), *squares = means + pieces.count * C;
  const Kernels& kernel = kernels();
  share(pieces.count, kBackwards, [&](int64_t i) {
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
  float *mean = statistics.mutable_data_ptr<float>(), *rstd = mean + C;
  float *old_mean = running_mean.mutable_data_ptr<float>(), *old_var = running_var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    mean[c] = static_cast<float>(centre[c]);
    rstd[c] = static_cast<float>(1 / std::sqrt(spread[c] / rows + eps));
    old_mean[c] += static_cast<float>(momentum * (centre[c] - old_mean[c]));
    old_var[c] += static_cast<float>(momentum * (spread[c] / (rows - 1) - old_var[c]));
  }
  return {statistics, weight, bias};
}

void Norm::write(const Tensor& x, Activation activation, const Tensor& residual, const Tensor& out) const {
  const Tensor map = as_rows(x), added = residual.defined() ? as_rows(residual) : residual;
  const int64_t C = map.size(1);
  check(C);
  check_out(out, map);
  if (added.defined())
    check_same(added, map, "residual");
  std::vector<float> scale(C);
  const Normalization n = normalization(scale.data(), activation);
  const Matrix from = matrix_of(map), to = matrix_of(out), below = added.defined() ? matrix_of(added) : Matrix{};
  const Kernels& kernel = kernels();
  const Pieces pieces = pieces_of(num_rows(map), C);
  share(pieces.count, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernel.normalize(n, from.from(row), below.from(row), to.from(row), pieces.size(i));
  });
}

Tensor Norm::operator()(const Tensor& x, Activation activation, const Tensor& residual) const {
  const Tensor out = new_like(x);
  write(x, activation, residual, out);
  return out;
}

Norm::Gradients Norm::backward(const Tensor& grad, const Tensor& x, Activation activation, const Tensor& out) const {
  const Tensor map = as_rows(x), gradient = as_rows(grad);
  const int64_t C = map.size(1), rows = num_rows(map);
  const Tensor dx = out.defined() ? out : new_like(map);
  const Pieces pieces = pieces_of(rows, C);
  check(C);
  check_same(gradient, map, "grad");
  check_out(dx, map);
  const Tensor dweight = floats(C), dbias = floats(C);
  float *scale = partial_sums((2 * pieces.count + 3) * C), *offset = scale + C, *slope = offset + C;
  float *sums = slope + C, *products = sums + pieces.count * C;
  const Normalization n = normalization(scale, activation);
  const Matrix from = matrix_of(map), g = matrix_of(gradient), to = matrix_of(dx);
  const Kernels& kernel = kernels();
  share(pieces.count, kBackwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernel.normalize_sums(n, g.from(row), from.from(row), pieces.size(i), sums + i * C, products + i * C);
  });
  std::vector<double> sum(C), product(C);
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < C; ++c) {
      sum[c] += sums[i * C + c];
      product[c] += products[i * C + c];
    }
  const float* rstd = statistics.const_data_ptr<float>() + statistics.stride(0);
  float *to_weight = dweight.mutable_data_ptr<float>(), *to_bias = dbias.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    const double r = rstd[c];
    to_bias[c] = static_cast<float>(sum[c]);
    to_weight[c] = static_cast<float>(product[c] * r);
    offset[c] = static_cast<float>(-scale[c] * sum[c] / rows);
    slope[c] = static_cast<float>(-scale[c] * product[c] * r * r / rows);
  }
  share(pieces.count, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernel.normalize_backward(n, offset, slope, g.from(row), from.from(row), to.from(row), pieces.size(i));
  });
  return {dx, dweight, dbias};
}

}  // namespace mobilemamba
