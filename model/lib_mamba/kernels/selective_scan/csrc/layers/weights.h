// The layouts in which the kernels read weights. Nothing else knows them: Python calls the operators of these names.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"

namespace mobilemamba {

// A matrix (K, N) to (K * N'): its columns, padded with zeros to whole vectors of this processor, in panels (`Weight`).
at::Tensor pack_columns(const at::Tensor& matrix);

// The same for a matrix in training, or for the transpose of one, which is packed for every product.
at::Tensor pack_panels(const Matrix& weight, int64_t rows, int64_t columns, bool is_transposed);

// That result, of `rows` by `columns`, for the kernels.
Weight weight_of(const at::Tensor& packed, int64_t rows, int64_t columns);

// A depthwise weight (C, 1, side, side) to (side, side, C), and back.
at::Tensor pack_depthwise(const at::Tensor& weight);
at::Tensor unpack_depthwise(const at::Tensor& packed);

// The depthwise weight of the Haar bands (4C, 1, side, side), where a channel's four bands follow one another, to
// (side, side, 4C), band by band; and back.
at::Tensor pack_bands(const at::Tensor& weight);
at::Tensor unpack_bands(const at::Tensor& packed);

}  // namespace mobilemamba
