#include "layers/maps.h"

#include <ATen/ops/empty.h>

namespace mobilemamba {

using at::Tensor;

Tensor channels_last(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "a map must be (B, C, H, W) in float32, got ", x.sizes());
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor as_rows(const Tensor& x) {
  const Tensor map = channels_last(x);
  const int64_t H = map.size(2), W = map.size(3), stride = row_stride(map);
  const bool is_even = (H == 1 || map.stride(2) == W * stride) && (map.size(0) == 1 || map.stride(0) == H * W * stride);
  return is_even ? map : map.permute({0, 2, 3, 1}).contiguous().permute({0, 3, 1, 2});
}

int64_t row_stride(const Tensor& map) {
  return map.size(3) > 1 ? map.stride(3) : map.size(2) > 1 ? map.stride(2) : map.stride(0);
}

int64_t num_rows(const Tensor& map) {
  return map.size(0) * map.size(2) * map.size(3);
}

Tensor new_map(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return at::empty({batch, channels, height, width}, at::TensorOptions(at::kFloat), at::MemoryFormat::ChannelsLast);
}

Tensor new_like(const Tensor& map) {
  return new_map(map.size(0), map.size(1), map.size(2), map.size(3));
}

Tensor traced_map(const Tensor& x, c10::SymInt channels, c10::SymInt height, c10::SymInt width) {
  return at::empty_symint({x.sym_size(0), channels, height, width}, x.options(), at::MemoryFormat::ChannelsLast);
}

Tensor sequence_of(const Tensor& map) {
  return map.permute({0, 2, 3, 1}).flatten(1, 2);
}

Tensor map_like(const Tensor& sequence, const Tensor& map) {
  return sequence.reshape({map.size(0), map.size(2), map.size(3), sequence.size(-1)}).permute({0, 3, 1, 2});
}

Map map_of(const Tensor& x) {
  return {
      x.size(2),
      x.size(3),
      x.size(1),
      x.stride(0),
      x.stride(2),
      x.stride(3),
      const_cast<float*>(x.const_data_ptr<float>()),
  };
}

Matrix matrix_of(const Tensor& map) {
  return {const_cast<float*>(map.const_data_ptr<float>()), row_stride(map)};
}

Map rows_of(const Tensor& map) {
  const int64_t H = map.size(2), W = map.size(3), stride = row_stride(map);
  return {H, W, map.size(1), H * W * stride, W * stride, stride, matrix_of(map).data};
}

Map map_without_gaps(int64_t height, int64_t width, int64_t channels, float* data) {
  return {height, width, channels, height * width * channels, width * channels, channels, data};
}

Map slice(const Map& x, int64_t first, int64_t channels) {
  Map part = x;
  part.channels = channels;
  part.data += first;
  return part;
}

Map from_image(const Map& x, int64_t image) {
  Map rest = x;
  rest.data += image * x.image;
  return rest;
}

Activation activation_of(int64_t number) {
  TORCH_CHECK(number >= kNone && number <= kSilu, "activations are 0 (none), 1 (ReLU) and 2 (SiLU), got ", number);
  return static_cast<Activation>(number);
}

void check_vector(const Tensor& tensor, int64_t size, const char* name) {
  TORCH_CHECK(
      tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.numel() == size, name, " must be ", size,
      " floats side by side, got ", tensor.sizes());
}

void check_same(const Tensor& tensor, const Tensor& map, const char* name) {
  TORCH_CHECK(tensor.sizes() == map.sizes(), name, " must be ", map.sizes(), ", got ", tensor.sizes());
}

}  // namespace mobilemamba
