// The layouts in which the kernels read weights. Nothing else knows them: Python calls the operators of these names.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kernels.h"

namespace mobilemamba {

// A matrix (K, N) to (K * N'): its columns, padded with zeros to whole vectors of this processor, in panels (`Weight`).
at::Tensor pack_columns(const at::Tensor& matrix);

// The same for a matrix of floats in training, which is packed for every product: its columns lie `column_stride`
// floats apart, and row i begins at `data + rows[i]`.
at::Tensor pack_panels(const float* data, const std::vector<int64_t>& rows, int64_t columns, int64_t column_stride);

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
