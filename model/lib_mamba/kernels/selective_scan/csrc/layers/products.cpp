// Products with a weight (C', C, 1, 1) in training, and their gradients, of the pixels as rows.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/share.h"
#include "layers/layers.h"
#include "layers/maps.h"
#include "layers/weights.h"

namespace mobilemamba {
namespace {

using at::Tensor;

// Rows of a weight's gradient that are made at a time, a multiple of those of a tile: the more, the less often x is
// copied.
constexpr int64_t kGradientRows = 256, kTileRows = 8;

// A weight's gradient in blocks of rows and panels, a few for each thread.
struct GradientBlocks {
  int64_t rows, columns;
  Panels panels;
  Pieces of_rows, of_panels;

  GradientBlocks(int64_t rows_, int64_t columns_)
      : rows(rows_),
        columns(columns_),
        panels{num_vectors(columns)},
        of_rows{ceil_div(rows, kTileRows), ceil_div(rows, kGradientRows)},
        of_panels{panels.count(), 1} {
    const int64_t threads = num_threads(), wanted = threads > 1 ? 2 * threads : 1;
    of_panels.count = std::min(panels.count(), ceil_div(wanted, of_rows.count));
    of_rows.count = std::min(of_rows.total, std::max(of_rows.count, ceil_div(wanted, of_panels.count)));
  }

  int64_t count() const { return of_rows.count * of_panels.count; }
  int64_t row(int64_t piece) const { return std::min(rows, of_rows.begin(piece) * kTileRows); }
  int64_t column(int64_t piece) const {
    const int64_t panel = of_panels.begin(piece);
    return panel < panels.count() ? panels[panel].start * kernels().lanes : columns;
  }
};

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

  Tensor packed() const { return pack_panels(view(), rows, columns, false); }
  Tensor packed_transpose() const { return pack_panels(view(), columns, rows, true); }

 private:
  Matrix view() const { return {const_cast<float*>(matrix.const_data_ptr<float>()), columns}; }
};

// Sums over the pixels of grad times x, (C', C). Threads take blocks of the result, whose sums do not depend on that.
Tensor weight_gradient(const Tensor& grad, const Tensor& x) {
  const int64_t rows = grad.size(1), columns = x.size(1);
  const Tensor out = floats(rows * columns);
  float* to = out.mutable_data_ptr<float>();
  const Matrix g = matrix_of(grad), from = matrix_of(x);
  const Kernels& kernel = kernels();
  const GradientBlocks blocks(rows, columns);
  const int64_t size = kernel.dense_weight_gradient_work_size(kGradientRows, columns);
  share_with_scratch(blocks.count(), size, [&](int64_t i, float* work) {
    const int64_t strip = i / blocks.of_panels.count, piece = i % blocks.of_panels.count;
    const int64_t row = blocks.row(strip), column = blocks.column(piece);
    DenseGradient d{};
    d.x = {g.data + row, g.stride};
    d.grad = {from.data + column, from.stride};
    d.count = num_rows(x);
    d.lines = 1;
    d.depth = blocks.row(strip + 1) - row;
    d.columns = blocks.column(piece + 1) - column;
    const Matrix sums{to + row * columns + column, columns};
    for (int64_t r = 0; r < d.depth; ++r)
      std::fill_n(sums.at(r), d.columns, 0.f);
    kernel.dense_weight_gradient(d, sums, work);
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
