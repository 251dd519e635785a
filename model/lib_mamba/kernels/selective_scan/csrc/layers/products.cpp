// Products with a weight (C', C, 1, 1) in training, and their gradients, of the pixels as rows.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/share.h"
#include "layers/layers.h"
#include "layers/maps.h"
#include "layers/weights.h"

namespace mobilemamba {
namespace {

using at::Tensor;

// Pixels whose part of a weight's gradient is added at a time, for so many of its rows: both maps' stay in the cache.
constexpr int64_t kPixels = 64, kGradientRows = 48;

// A weight as a matrix (C', C).
struct WeightMatrix {
  Tensor matrix;
  int64_t rows, columns;

  WeightMatrix(const Tensor& weight, int64_t channels)
      : matrix(weight.contiguous()), rows(weight.size(0)), columns(channels) {
    TORCH_CHECK(
        weight.scalar_type() == at::kFloat && weight.dim() >= 2 && weight.size(1) == channels &&
            weight.numel() == rows * channels,
        "weight must be (C', ", channels, ", 1, 1) in float32, got ", weight.sizes());
  }

  Tensor packed() const { return pack_panels(data(), offsets(rows, columns), columns, 1); }
  Tensor packed_transpose() const { return pack_panels(data(), offsets(columns, 1), rows, columns); }

 private:
  const float* data() const { return matrix.const_data_ptr<float>(); }

  static std::vector<int64_t> offsets(int64_t count, int64_t stride) {
    std::vector<int64_t> rows(count);
    for (int64_t i = 0; i < count; ++i)
      rows[i] = i * stride;
    return rows;
  }
};

// Sums over the pixels of grad times x, (C', C). Threads take rows of the result, whose sums do not depend on that.
Tensor weight_gradient(const Tensor& grad, const Tensor& x) {
  const int64_t rows = grad.size(1), columns = x.size(1), pixels = num_rows(x);
  const Tensor out = floats(rows * columns);
  float* to = out.mutable_data_ptr<float>();
  const Matrix g = matrix_of(grad), from = matrix_of(x);
  const Pieces pieces{rows, std::min(rows, round_up(ceil_div(rows, kGradientRows), num_threads()))};
  share(pieces.count, kForwards, [&](int64_t i) {
    const int64_t first = pieces.begin(i);
    const Matrix sums{to + first * columns, columns};
    std::fill_n(sums.data, pieces.size(i) * columns, 0.f);
    DenseGradient d{};
    d.lines = 1;
    d.depth = pieces.size(i);
    d.columns = columns;
    for (int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
      d.x = {g.at(pixel) + first, g.stride};
      d.grad = from.from(pixel);
      d.count = std::min(kPixels, pixels - pixel);
      kernels().dense_weight_gradient(d, sums);
    }
  });
  return out;
}

void multiply(
    const Tensor& map, const Tensor& packed, const Tensor& bias, const Tensor& residual, Activation activation,
    const Tensor& out) {
  const Tensor added = bias.defined() ? bias : at::zeros({out.size(1)}, at::TensorOptions(at::kFloat));
  const Matrix below = residual.defined() ? matrix_of(residual) : Matrix{};
  pointwise_into(rows_of(map), map.size(0), packed, added, below, activation, rows_of(out));
}

}  // namespace

Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation) {
  const Tensor map = as_rows(x);
  const WeightMatrix matrix(weight, map.size(1));
  const Tensor out = new_map(map.size(0), matrix.rows, map.size(2), map.size(3));
  multiply(map, matrix.packed_transpose(), bias, {}, activation, out);
  return out;
}

Gradients product_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& base) {
  const Tensor map = as_rows(x), gradient = as_rows(grad), dx = new_like(map);
  const WeightMatrix matrix(weight, map.size(1));
  const Tensor below = base.defined() ? as_rows(base) : base;
  if (below.defined())
    check_same(below, map, "base");
  TORCH_CHECK(
      gradient.size(1) == matrix.rows && num_rows(gradient) == num_rows(map),
      "grad does not fit to x: ", gradient.sizes());
  multiply(gradient, matrix.packed(), {}, below, kNone, dx);
  return {dx, weight_gradient(gradient, map).view(weight.sizes())};
}

}  // namespace mobilemamba
