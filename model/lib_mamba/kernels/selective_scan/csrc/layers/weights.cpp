#include "layers/weights.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/share.h"
#include "layers/maps.h"

namespace mobilemamba {
namespace {

using at::Tensor;

constexpr int64_t kBands = 4;

// Never a view: an operator may not return its argument.
Tensor copy_of(const Tensor& view) {
  return view.clone(at::MemoryFormat::Contiguous);
}

void check_depthwise(const Tensor& weight) {
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3),
      "a depthwise weight must be (C, 1, side, side), got ", weight.sizes());
}

}  // namespace

Tensor pack_columns(const Tensor& matrix) {
  TORCH_CHECK(matrix.dim() == 2 && matrix.size(1) > 0, "a matrix must be (K, N), got ", matrix.sizes());
  const int64_t columns = matrix.size(1), lanes = kernels().lanes, vectors = num_vectors(columns);
  const Tensor padded = at::constant_pad_nd(matrix, {0, vectors * lanes - columns});
  const Panels panels{vectors};
  std::vector<Tensor> parts;
  for (int64_t i = 0; i < panels.count(); ++i)
    parts.push_back(padded.narrow(1, panels[i].start * lanes, panels[i].count * lanes).flatten());
  return at::cat(parts);
}

Tensor pack_panels(const Matrix& weight, int64_t rows, int64_t columns, bool is_transposed) {
  const Kernels& kernel = kernels();
  const Panels panels{num_vectors(columns)};
  const Tensor packed = floats(rows * panels.vectors * kernel.lanes);
  float* to = packed.mutable_data_ptr<float>();
  share(panels.count(), kForwards, [&](int64_t panel) {
    const int64_t first = panels[panel].start * kernel.lanes, width = panels[panel].count * kernel.lanes;
    const int64_t used = std::min(width, columns - first);
    if (is_transposed)
      kernel.pack_transposed_panel(weight.from(first), rows, used, width, to + first * rows);
    else
      kernel.pack_panel({weight.data + first, weight.stride}, rows, used, width, to + first * rows);
  });
  return packed;
}

Weight weight_of(const Tensor& packed, int64_t rows, int64_t columns) {
  check_vector(packed, rows * num_vectors(columns) * kernels().lanes, "weight, in panels,");
  return {rows, packed.const_data_ptr<float>()};
}

Tensor pack_depthwise(const Tensor& weight) {
  check_depthwise(weight);
  return copy_of(weight.squeeze(1).permute({1, 2, 0}));
}

Tensor unpack_depthwise(const Tensor& packed) {
  return copy_of(packed.permute({2, 0, 1})).unsqueeze(1);
}

Tensor pack_bands(const Tensor& weight) {
  check_depthwise(weight);
  TORCH_CHECK(weight.size(0) % kBands == 0, "the weight of bands must be (4C, 1, side, side), got ", weight.sizes());
  return copy_of(weight.squeeze(1).unflatten(0, {-1, kBands}).permute({2, 3, 1, 0})).flatten(2);
}

Tensor unpack_bands(const Tensor& packed) {
  return copy_of(packed.unflatten(2, {kBands, -1}).permute({3, 2, 0, 1})).flatten(0, 1).unsqueeze(1);
}

}  // namespace mobilemamba

// Composite: for any type and device, and followed by autograd and tracers.
TORCH_LIBRARY_IMPL(mobilemamba_kernels, CompositeImplicitAutograd, m) {
  m.impl("pack_columns", mobilemamba::pack_columns);
  m.impl("pack_depthwise", mobilemamba::pack_depthwise);
  m.impl("pack_bands", mobilemamba::pack_bands);
}
