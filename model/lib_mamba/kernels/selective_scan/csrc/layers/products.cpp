// Products with a weight (C', C, 1, 1) in training, and their gradients: PyTorch's own, of the pixels as rows.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "layers/layers.h"
#include "layers/maps.h"

namespace mobilemamba {
namespace {

using at::Tensor;

Tensor matrix_view(const Tensor& map) {
  return map.as_strided({num_rows(map), map.size(1)}, {row_stride(map), 1});
}

Tensor matrix_view(const Tensor& weight, int64_t channels) {
  TORCH_CHECK(
      weight.dim() >= 2 && weight.size(1) == channels && weight.numel() == weight.size(0) * channels,
      "weight must be (C', ", channels, ", 1, 1), got ", weight.sizes());
  return weight.reshape({weight.size(0), channels});
}

}  // namespace

Tensor product(const Tensor& x, const Tensor& weight) {
  const Tensor map = as_rows(x), matrix = matrix_view(weight, map.size(1));
  const Tensor out = new_map(map.size(0), matrix.size(0), map.size(2), map.size(3));
  Tensor rows = matrix_view(out);
  at::mm_out(rows, matrix_view(map), matrix.t());
  return out;
}

Gradients product_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& base) {
  const Tensor map = as_rows(x), gradient = as_rows(grad), matrix = matrix_view(weight, map.size(1));
  const Tensor rows = matrix_view(gradient), dx = new_like(map);
  Tensor out = matrix_view(dx);
  if (base.defined()) {
    check_same(base, map, "base");
    at::addmm_out(out, matrix_view(as_rows(base)), rows, matrix);
  } else {
    at::mm_out(out, rows, matrix);
  }
  return {dx, at::mm(rows.t(), matrix_view(map)).view(weight.sizes())};
}

}  // namespace mobilemamba
