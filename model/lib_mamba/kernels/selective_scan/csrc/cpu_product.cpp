// Products of pixels with a weight (C', C, 1, 1), as layers are trained with them. In float32; maps are channels-last.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu_dispatch.h"
#include "cpu_maps.h"
#include "cpu_norm.h"

namespace mobilemamba {
namespace {

using at::Tensor;

constexpr int64_t kTile = 128;   // rows that go from one end of a layer's gradient to the other in the cache
constexpr int64_t kFewest = 64;  // rows for every thread: with fewer, adding up their gradients of the weight takes longest

Tensor matrix_view(const Tensor& map) {
  return map.as_strided({num_rows(map), map.size(1)}, {row_stride(map), 1});
}

Tensor matrix_view(const Tensor& weight, int64_t channels) {
  TORCH_CHECK(
      weight.dim() >= 2 && weight.size(1) == channels && weight.numel() == weight.size(0) * channels,
      "weight must be (C', ", channels, ", 1, 1), got ", weight.sizes());
  return weight.reshape({weight.size(0), channels});
}

Tensor product(const Tensor& x, const Tensor& weight) {
  const Tensor map = as_rows(x), matrix = matrix_view(weight, map.size(1));
  const Tensor out = new_map(map.size(0), matrix.size(0), map.size(2), map.size(3));
  Tensor rows = matrix_view(out);
  at::mm_out(rows, matrix_view(map), matrix.t());
  return out;
}

int64_t padded(int64_t channels) {
  return (channels + kColumns - 1) / kColumns * kColumns;
}

// Rows padded by zeros.
Tensor pad_rows(const Tensor& matrix) {
  const int64_t width = padded(matrix.size(1));
  if (width == matrix.size(1) && matrix.is_contiguous())
    return matrix;
  const Tensor out = at::zeros({matrix.size(0), width}, matrix.options());
  out.narrow(1, 0, matrix.size(1)).copy_(matrix);
  return out;
}

// The gradient of norm(product(h)) where h is x, or act(norm(x)) + residual: tile after tile, from the gradient of the
// norm to that of h, of which the sums for x's norm are made on the way.
struct Layer {
  NormGradient outer;
  Matrix grad, u;
  const Normalization* inner;  // of x, or null
  Matrix x, residual, base, dx;
  int64_t columns, depth;  // C', C
  Tensor weight;           // (C', C padded)

  // `scratch` is (tile, C' + C padded); `dweight` is (C', C padded), added to.
  void tile(int64_t first, int64_t rows, float* scratch, float* dweight, float* sums, float* products) const {
    const Kernels& kernel = kernels();
    const int64_t width = weight.size(1);
    const Matrix du{scratch, columns}, h{scratch + kTile * columns, width};
    kernel.normalize_backward(
        outer.n, outer.offset.const_data_ptr<float>(), outer.slope.const_data_ptr<float>(), grad.from(first),
        u.from(first), du, rows);
    if (inner)
      kernel.normalize(*inner, x.from(first), residual.from(first), h, rows);
    else
      for (int64_t row = 0; row < rows; ++row)
        std::copy_n(x.at(first + row), depth, h.at(row));
    for (int64_t row = 0; row < rows; ++row)
      std::fill(h.at(row) + depth, h.at(row) + width, 0.f);
    kernel.dense_weight({du, h, rows, 1, 0, 0, columns, width / kernel.lanes}, {dweight, width});
    const Dense d{columns, depth, width, 1, 0, 0, weight.const_data_ptr<float>(), zeros.const_data_ptr<float>(), kNone,
                  base.data ? base.at(first) : nullptr, base.stride, dx.at(first), dx.stride};
    kernel.dense(d, du.data, columns, rows, 0, (depth + kernel.lanes - 1) / kernel.lanes);
    if (inner)
      kernel.normalize_sums(*inner, dx.from(first), x.from(first), rows, sums, products);
  }

  Tensor zeros;  // (C)
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics statistics_of(at::TensorList norm, double eps) {
  TORCH_CHECK(norm.size() == 4, "a norm must be mean, var, weight and bias");
  return {norm[0], norm[1], norm[2], norm[3], eps};
}

// dx (that of h), dweight, the outer norm's dweight and dbias, and the sums for x's norm.
Gradients layer_backward(
    const Tensor& grad, const Tensor& u, at::TensorList norm, double eps, int64_t activation,
    const std::optional<Tensor>& sums, const Tensor& x, at::TensorList x_norm, double x_eps, int64_t x_activation,
    const std::optional<Tensor>& residual, const Tensor& weight, const std::optional<Tensor>& base) {
  const Tensor map = as_rows(x), middle = as_rows(u), gradient = as_rows(grad);
  const Tensor added = residual ? as_rows(*residual) : Tensor(), below = base ? as_rows(*base) : Tensor();
  const int64_t C = map.size(1), columns = middle.size(1), rows = num_rows(map);
  const Tensor matrix = matrix_view(weight, C);
  const Statistics statistics = statistics_of(norm, eps);
  statistics.check(columns);
  check_same(gradient, middle, "grad");
  TORCH_CHECK(matrix.size(0) == columns && num_rows(middle) == rows, "u does not fit to x and weight: ", u.sizes());
  if (residual)
    check_same(added, map, "residual");
  if (base)
    check_same(below, map, "base");
  NormGradient outer(statistics, activation_of(activation));
  const Tensor total = sums ? *sums : sums_of(outer.n, gradient, middle);
  outer.set(statistics, total, rows);
  const Tensor dx = new_map(map.size(0), C, map.size(2), map.size(3)), scale = floats(C);
  Normalization inner{};
  if (!x_norm.empty()) {
    const Statistics x_statistics = statistics_of(x_norm, x_eps);
    x_statistics.check(C);
    inner = x_statistics.normalization(scale.mutable_data_ptr<float>(), activation_of(x_activation));
  }
  const bool has_norm = !x_norm.empty();
  if (rows < kFewest * num_threads()) {
    const Tensor du = new_map(middle.size(0), columns, middle.size(2), middle.size(3));
    normalize_backward(gradient, middle, norm[0], norm[1], norm[2], norm[3], eps, activation, total, du);
    const Tensor h = has_norm ? normalize(map, x_norm[0], x_norm[1], x_norm[2], x_norm[3], x_eps, x_activation, residual) : map;
    Tensor out = matrix_view(dx);
    if (base)
      at::addmm_out(out, matrix_view(below), matrix_view(du), matrix);
    else
      at::mm_out(out, matrix_view(du), matrix);
    const Tensor dweight = at::mm(matrix_view(du).t(), matrix_view(h)).view(weight.sizes());
    return {dx, dweight, outer.dweight, outer.dbias, has_norm ? sums_of(inner, dx, map) : Tensor()};
  }
  const Layer layer{outer, matrix_of(gradient), matrix_of(middle), has_norm ? &inner : nullptr, matrix_of(map),
                    residual ? matrix_of(added) : Matrix{}, base ? matrix_of(below) : Matrix{}, matrix_of(dx), columns, C,
                    pad_rows(matrix), at::zeros({C}, matrix.options())};
  const int64_t width = layer.weight.size(1), size = columns * width, threads = num_threads();
  const Pieces tiles{rows, (rows + 2 * kTile - 1) / (2 * kTile) * 2};  // an even number, for an even number of threads
  const Tensor partial_sums = floats(2 * tiles.count * C), dweights = floats(threads * size);
  float *tile_sums = partial_sums.mutable_data_ptr<float>(), *tile_products = tile_sums + tiles.count * C;
  std::vector<char> is_used(threads);
  at::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
    const int64_t thread = at::get_thread_num();
    float* dweight = dweights.mutable_data_ptr<float>() + thread * size;
    std::fill_n(dweight, size, 0.f);
    is_used[thread] = 1;
    const Tensor scratch = floats(kTile * (columns + width));
    for (int64_t i = begin; i < end; ++i)
      layer.tile(tiles.begin(i), tiles.size(i), scratch.mutable_data_ptr<float>(), dweight, tile_sums + i * C,
                 tile_products + i * C);
  });
  const Tensor dweight = at::empty({columns, C}, matrix.options());
  at::parallel_for(0, columns, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* to = dweight.mutable_data_ptr<float>() + row * C;
      std::fill_n(to, C, 0.f);
      for (int64_t thread = 0; thread < threads; ++thread) {
        const float* from = dweights.const_data_ptr<float>() + thread * size + row * width;
        if (is_used[thread])
          for (int64_t c = 0; c < C; ++c)
            to[c] += from[c];
      }
    }
  });
  const Tensor inner_sums = has_norm ? add_pieces(tiles, C, tile_sums, tile_products) : Tensor();
  return {dx, dweight.view(weight.sizes()), outer.dweight, outer.dbias, inner_sums};
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("product", mobilemamba::product);
  m.impl("layer_backward", mobilemamba::layer_backward);
}
