// Batch normalisation on one batch, and its gradients; factors, activations and sums of channels. Sums are made in an
// order that does not depend on the number of threads.
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

// Sums over the pixels of two maps in double precision, as `Kernels::normalize_sums` defines them.
struct Sums {
  std::vector<double> of_grad, of_products;

  Sums(const Normalization& n, const Matrix& grad, const Matrix& x, const Pieces& pieces)
      : of_grad(n.channels), of_products(n.channels) {
    const int64_t C = n.channels;
    float *sums = partial_sums(2 * pieces.count * C), *products = sums + pieces.count * C;
    share(pieces.count, kBackwards, [&](int64_t i) {
      const int64_t row = pieces.begin(i);
      kernels().normalize_sums(n, grad.from(row), x.from(row), pieces.size(i), sums + i * C, products + i * C);
    });
    for (int64_t i = 0; i < pieces.count; ++i)
      for (int64_t c = 0; c < C; ++c) {
        of_grad[c] += sums[i * C + c];
        of_products[c] += products[i * C + c];
      }
  }
};

// x * factor, with no mean and no shift.
struct Scaling {
  std::vector<float> zeros, ones;
  Normalization n;

  Scaling(int64_t channels, const float* factor, Activation activation)
      : zeros(channels),
        ones(factor ? 0 : channels, 1.f),
        n{channels, zeros.data(), factor ? factor : ones.data(), zeros.data(), activation} {}
};

Tensor vector_of(const std::vector<double>& values) {
  const Tensor out = floats(values.size());
  std::transform(values.begin(), values.end(), out.mutable_data_ptr<float>(), [](double v) { return v; });
  return out;
}

Tensor new_images(const Tensor& x) {
  return new_map(x.size(0), x.size(1), 1, 1);
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
  std::vector<float> factors(3 * C);
  float *scale = factors.data(), *offset = scale + C, *slope = offset + C;
  const Normalization n = normalization(scale, activation);
  const Matrix from = matrix_of(map), g = matrix_of(gradient), to = matrix_of(dx);
  const Sums sums(n, g, from, pieces);
  const std::vector<double>&sum = sums.of_grad, &product = sums.of_products;
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
    kernels().normalize_backward(n, offset, slope, g.from(row), from.from(row), to.from(row), pieces.size(i));
  });
  return {dx, dweight, dbias};
}

void scale_into(
    const Tensor& x, const Tensor& factor, Activation activation, const Tensor& residual, const Tensor& out) {
  const Tensor map = as_rows(x), added = residual.defined() ? as_rows(residual) : residual;
  const int64_t C = map.size(1);
  check_out(out, map);
  if (factor.defined())
    check_vector(factor, C, "factor");
  if (added.defined())
    check_same(added, map, "residual");
  const Scaling scaling(C, factor.defined() ? factor.const_data_ptr<float>() : nullptr, activation);
  const Matrix from = matrix_of(map), to = matrix_of(out), below = added.defined() ? matrix_of(added) : Matrix{};
  const Pieces pieces = pieces_of(num_rows(map), C);
  share(pieces.count, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernels().normalize(scaling.n, from.from(row), below.from(row), to.from(row), pieces.size(i));
  });
}

void activation_gradient_into(const Tensor& grad, const Tensor& x, Activation activation, const Tensor& out) {
  const Tensor map = as_rows(x), gradient = as_rows(grad);
  check_same(gradient, map, "grad");
  check_out(out, map);
  const Scaling scaling(map.size(1), nullptr, activation);
  const float* zeros = scaling.zeros.data();
  const Matrix from = matrix_of(map), g = matrix_of(gradient), to = matrix_of(out);
  const Pieces pieces = pieces_of(num_rows(map), map.size(1));
  share(pieces.count, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernels().normalize_backward(scaling.n, zeros, zeros, g.from(row), from.from(row), to.from(row), pieces.size(i));
  });
}

Tensor channel_sums(const Tensor& x) {
  const Tensor map = as_rows(x);
  const Scaling scaling(map.size(1), nullptr, kNone);
  return vector_of(Sums(scaling.n, matrix_of(map), matrix_of(map), pieces_of(num_rows(map), map.size(1))).of_grad);
}

Tensor channel_products(const Tensor& x, const Tensor& y) {
  const Tensor map = as_rows(x), other = as_rows(y);
  check_same(other, map, "y");
  const Scaling scaling(map.size(1), nullptr, kNone);
  const Pieces pieces = pieces_of(num_rows(map), map.size(1));
  return vector_of(Sums(scaling.n, matrix_of(map), matrix_of(other), pieces).of_products);
}

Tensor image_means(const Tensor& x) {
  const Tensor map = as_rows(x), out = new_images(map);
  const int64_t C = map.size(1), pixels = map.size(2) * map.size(3);
  float* mean = out.mutable_data_ptr<float>();
  share(map.size(0), kForwards, [&](int64_t image) {
    kernels().means(matrix_of(map).from(image * pixels), pixels, C, mean + image * C);
  });
  return out;
}

Tensor image_products(const Tensor& x, const Tensor& y) {
  const Tensor map = as_rows(x), other = as_rows(y), out = new_images(map);
  check_same(other, map, "y");
  const int64_t C = map.size(1), pixels = map.size(2) * map.size(3);
  const Scaling scaling(C, nullptr, kNone);
  float* products = out.mutable_data_ptr<float>();
  share_with_scratch(map.size(0), C, [&](int64_t image, float* sums) {
    const int64_t row = image * pixels;
    kernels().normalize_sums(
        scaling.n, matrix_of(map).from(row), matrix_of(other).from(row), pixels, sums, products + image * C);
  });
  return out;
}

Tensor scale_images(const Tensor& x, const Tensor& factor, const Tensor& shift) {
  const Tensor map = as_rows(x), out = new_like(map);
  const int64_t C = map.size(1), pixels = map.size(2) * map.size(3);
  check_vector(factor, map.size(0) * C, "factor");
  if (shift.defined())
    check_vector(shift, map.size(0) * C, "shift");
  const std::vector<float> zeros(C);
  share(map.size(0), kForwards, [&](int64_t image) {
    const int64_t row = image * pixels, first = image * C;
    const float* added = shift.defined() ? shift.const_data_ptr<float>() + first : zeros.data();
    const Normalization n{C, zeros.data(), factor.const_data_ptr<float>() + first, added, kNone};
    kernels().normalize(n, matrix_of(map).from(row), {}, matrix_of(out).from(row), pixels);
  });
  return out;
}

}  // namespace mobilemamba
