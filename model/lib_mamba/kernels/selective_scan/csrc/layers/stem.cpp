// The stem's convolutions in training: 3 x 3, stride 2, padding 1, over all channels, of a map that passes a norm and a
// ReLU on its way in. The results of these stay in the cache: rows of pixels, with zeros around them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
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

constexpr int64_t kSide = 3, kStride = 2, kPadding = 1;
constexpr int64_t kStrip = 8;  // rows of the output, as one piece of work

// The input of a convolution, row by row.
struct Input {
  Tensor map, scale;
  Map x;
  Normalization n;
  int64_t row;  // floats in a row between its zeros

  Input(const Tensor& tensor, const Norm& norm)
      : map(channels_last(tensor)),
        scale(floats(map.size(1))),
        x(map_of(map)),
        row((x.width + 2 * kPadding) * x.channels) {
    norm.check(x.channels);
    n = norm.normalization(scale.mutable_data_ptr<float>(), kRelu);
  }

  // Rows off the map are zeros.
  void read(int64_t image, int64_t y, float* to) const {
    const int64_t C = x.channels;
    if (y < 0 || y >= x.height) {
      std::fill_n(to, row, 0.f);
      return;
    }
    const Matrix from{x.data + image * x.image + y * x.row, x.pixel};
    std::fill_n(to, C, 0.f);
    kernels().normalize(n, from, {}, {to + C, C}, x.width);
    std::fill_n(to + row - C, C, 0.f);
  }

  static int64_t strip_rows(int64_t count) { return kStride * (count - 1) + kSide; }

  // The rows under the kernel for `count` rows of the output, from row `first` on.
  void read_strip(int64_t image, int64_t first, int64_t count, float* to) const {
    for (int64_t y = 0; y < strip_rows(count); ++y)
      read(image, first * kStride - kPadding + y, to + y * row);
  }
};

void check_weight(const Tensor& weight, int64_t channels) {
  TORCH_CHECK(
      weight.scalar_type() == at::kFloat && weight.dim() == 4 && weight.size(1) == channels &&
          weight.size(2) == kSide && weight.size(3) == kSide,
      "weight must be (C', ", channels, ", 3, 3) in float32, got ", weight.sizes());
}

}  // namespace

Tensor strided_conv(const Tensor& x, const Norm& norm, const Tensor& weight) {
  const Input input(x, norm);
  const int64_t C = input.x.channels, columns = weight.size(0);
  check_weight(weight, C);
  const int64_t height = convolved(input.x.height, kSide, kStride, kPadding);
  const int64_t width = convolved(input.x.width, kSide, kStride, kPadding);
  const Tensor out = new_map(x.size(0), columns, height, width);
  const Tensor packed = pack_columns(weight.permute({2, 3, 1, 0}).flatten(0, 2));
  const Tensor bias = at::zeros({columns}, at::TensorOptions(at::kFloat));
  const int64_t depth = kSide * C;
  Dense whole;
  whole.depth = whole.piece_rows = depth;
  whole.columns = whole.out_row = columns;
  whole.pieces = kSide;
  whole.piece_stride = input.row;
  whole.weight = weight_of(packed, kSide * depth, columns);
  whole.bias = bias.const_data_ptr<float>();
  whole.out = out.mutable_data_ptr<float>();
  const Strips strips{height, kStrip};
  share_with_scratch(x.size(0) * strips.count(), input.strip_rows(kStrip) * input.row, [&](int64_t i, float* rows) {
    const int64_t image = i / strips.count(), strip = i % strips.count();
    const int64_t first = strips.begin(strip), count = strips.end(strip) - first;
    input.read_strip(image, first, count, rows);
    for (int64_t y = 0; y < count; ++y) {
      Dense d = whole;
      d.out += (image * height + first + y) * width * columns;
      kernels().dense(d, rows + y * kStride * input.row, kStride * C, width, 0, num_panels(columns));
    }
  });
  return out;
}

namespace {

// A row of the gradient, a zero pixel behind it; one off the map is zeros.
void read_row(const Map& grad, int64_t image, int64_t y, float* to) {
  const float* from = grad.data + image * grad.image + y * grad.row;
  const int64_t count = y < grad.height ? grad.width : 0;
  for (int64_t x = 0; x < count; ++x)
    to = std::copy_n(from + x * grad.pixel, grad.channels, to);
  std::fill_n(to, (grad.width + 1 - count) * grad.channels, 0.f);
}

// The transpose of the convolution. A pixel in an even row was seen only by the kernel's middle row; one in the odd row
// 2i + 1 by its last row, in row i of the output, and by its first, in row i + 1. The same holds for columns. With both
// in the order middle, last, first, each of the four kinds of pixels is a product with weights that lie side by side.
struct Transpose {
  Map grad, dx;
  Tensor bias;    // (C), zeros
  int64_t row;    // floats in a row of the gradient, a zero pixel behind it
  Tensor packed;  // (3 * 3 * C', C) in panels
  Weight weights;

  Transpose(const Map& grad_, const Map& dx_, const Tensor& weight)
      : grad(grad_),
        dx(dx_),
        bias(at::zeros({dx_.channels}, at::TensorOptions(at::kFloat))),
        row((grad_.width + 1) * grad_.channels),
        packed(pack_columns(in_order(weight).flatten(0, 2))),
        weights(weight_of(packed, kSide * kSide * grad_.channels, dx_.channels)) {}

  static Tensor in_order(const Tensor& weight) {
    const Tensor order = at::tensor({1, 2, 0}, at::kLong);
    return weight.permute({2, 3, 0, 1}).index_select(0, order).index_select(1, order);
  }

  // Pixels of one kind in row y, from rows of the gradient.
  void pixels(const float* rows, int64_t image, int64_t y, bool is_odd) const {
    const int64_t is_odd_row = y % kStride, C = grad.channels;
    Dense d;
    d.depth = (1 + is_odd) * C;
    d.columns = dx.channels;
    d.pieces = 1 + is_odd_row;
    d.piece_stride = row;
    d.first_row = (is_odd_row * kSide + is_odd) * C;
    d.piece_rows = kSide * C;
    d.weight = weights;
    d.bias = bias.const_data_ptr<float>();
    d.out = dx.data + image * dx.image + y * dx.row + is_odd * dx.pixel;
    d.out_row = kStride * dx.pixel;
    const int64_t count = (dx.width + 1 - is_odd) / kStride;
    kernels().dense(d, rows, grad.channels, count, 0, num_panels(dx.channels));
  }

  // The rows of dx that belong to rows [first, last) of the gradient.
  void strip(int64_t image, int64_t first, int64_t last, float* rows) const {
    for (int64_t y = first; y <= last; ++y)
      read_row(grad, image, y, rows + (y - first) * row);
    for (int64_t y = kStride * first; y < std::min(kStride * last, dx.height); ++y)
      for (const bool is_odd : {false, true})
        pixels(rows + (y / kStride - first) * row, image, y, is_odd);
  }
};

// (3, C', 3, C): for every row of the kernel, rows of the gradient times those of x under it.
Tensor weight_gradient(const Map& grad, const Input& input, int64_t images) {
  const int64_t C = input.x.channels, columns = kSide * C, block = grad.channels * columns;
  const Tensor dweight = at::empty({kSide, grad.channels, kSide, C}, at::TensorOptions(at::kFloat));
  const Strips strips{grad.height, kStrip};
  const int64_t size = input.strip_rows(kStrip) * input.row;
  const auto add_strip = [&](int64_t image, int64_t strip, float* sums, float* x) {
    const int64_t top = strips.begin(strip), lines = strips.end(strip) - top;
    input.read_strip(image, top, lines, x);
    DenseGradient d{};
    d.x = {grad.data + image * grad.image + top * grad.row, grad.pixel};
    d.count = grad.width;
    d.lines = lines;
    d.x_line = grad.row;
    d.grad_line = kStride * input.row;
    d.depth = grad.channels;
    d.columns = columns;
    for (int64_t i = 0; i < kSide; ++i) {
      d.grad = {x + i * input.row, kStride * C};
      kernels().dense_weight_gradient(d, {sums + i * block, columns}, x + size);
    }
  };
  const auto add_images = [&](int64_t first, int64_t last, int64_t, float* sums, float* x) {
    for (int64_t image = first; image < last; ++image)
      for (int64_t strip = 0; strip < strips.count(); ++strip)
        add_strip(image, strip, sums, x);
  };
  const int64_t work = kernels().dense_weight_gradient_work_size(grad.channels, columns);
  sum_images(images, 1, dweight.numel(), dweight.mutable_data_ptr<float>(), size + work, add_images);
  return dweight;
}

}  // namespace

Gradients strided_conv_backward(const Tensor& grad, const Tensor& x, const Norm& norm, const Tensor& weight) {
  const Input input(x, norm);
  const Tensor gradient = channels_last(grad);
  const int64_t C = input.x.channels, images = x.size(0);
  check_weight(weight, C);
  const int64_t height = convolved(input.x.height, kSide, kStride, kPadding);
  const int64_t width = convolved(input.x.width, kSide, kStride, kPadding);
  TORCH_CHECK(
      gradient.sizes() == at::IntArrayRef({images, weight.size(0), height, width}),
      "grad does not fit to x: ", gradient.sizes());
  const Map g = map_of(gradient);
  const Tensor dx = new_map(images, C, input.x.height, input.x.width);
  const Transpose transpose(g, map_of(dx), weight);
  const Strips strips{height, kStrip};
  share_with_scratch(images * strips.count(), (kStrip + 1) * transpose.row, [&](int64_t i, float* rows) {
    const int64_t strip = i % strips.count();
    transpose.strip(i / strips.count(), strips.begin(strip), strips.end(strip), rows);
  });
  return {dx, weight_gradient(g, input, images).permute({1, 3, 0, 2})};
}

}  // namespace mobilemamba
