// Feature maps as the CPU operators take them: channels-last, in float32.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"

namespace mobilemamba {

// A view where channels lie side by side, in channel slices of a larger map too.
at::Tensor channels_last(const at::Tensor& x);

// Pixels at equal distances from the first to the last, so that a map is a matrix: a view where they are already.
at::Tensor as_rows(const at::Tensor& x);

// The distance between neighbours in the sequence of all pixels; strides of sides of one pixel mean nothing.
int64_t row_stride(const at::Tensor& map);

// How many pixels all images have together.
int64_t num_rows(const at::Tensor& map);

at::Tensor new_map(int64_t batch, int64_t channels, int64_t height, int64_t width);

// A new map with the sizes of another.
at::Tensor new_like(const at::Tensor& map);

// A new map as a tracer sees it: type and device of x, no values.
at::Tensor traced_map(const at::Tensor& x, c10::SymInt channels, c10::SymInt height, c10::SymInt width);

// Pixels as a sequence (B, H * W, C), and a sequence as a map of the size of another: views of channels-last maps.
at::Tensor sequence_of(const at::Tensor& map);
at::Tensor map_like(const at::Tensor& sequence, const at::Tensor& map);

Map map_of(const at::Tensor& x);

// A map of `as_rows`: pixels by channels.
Matrix matrix_of(const at::Tensor& map);

// A map of `as_rows`, or one without gaps: pixels at equal distances from the first to the last.
Map rows_of(const at::Tensor& map);
Map map_without_gaps(int64_t height, int64_t width, int64_t channels, float* data);

// Some of the channels of a map.
Map slice(const Map& x, int64_t first, int64_t channels);

// A map from one image on.
Map from_image(const Map& x, int64_t image);

Activation activation_of(int64_t number);

void check_vector(const at::Tensor& tensor, int64_t size, const char* name);

void check_same(const at::Tensor& tensor, const at::Tensor& map, const char* name);

// A side of the output of a convolution; a tracer's sizes may be symbols.
template <class Size>
Size convolved(Size size, Size side, int64_t stride, int64_t padding) {
  return (size + 2 * padding - side) / stride + 1;
}

}  // namespace mobilemamba
