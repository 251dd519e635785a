// The layers of a folded network: products with bias, activation and residual, feed-forwards, squeeze-excite, the
// stem's convolutions. The mixer is in mixer.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/share.h"
#include "layers/layers.h"
#include "layers/maps.h"
#include "layers/weights.h"

namespace mobilemamba {
namespace {

using at::Tensor;

constexpr int64_t kRows = 64;  // of a product, as one piece of work: its results stay in the cache

Dense dense_of(const Tensor& weight, const Tensor& bias, int64_t depth, int64_t activation) {
  Dense d;
  d.depth = depth;
  d.columns = d.out_row = bias.numel();
  check_vector(bias, d.columns, "bias");
  d.weight = weight_of(weight, depth, d.columns);
  d.bias = bias.const_data_ptr<float>();
  d.activation = activation_of(activation);
  return d;
}

// Few rows are not worth a copy of the weights in every core's cache: there, threads take columns.
bool has_rows_for_threads(int64_t rows) {
  return rows >= kRows / 2 * num_threads();
}

Dense from_row(const Dense& d, int64_t row) {
  Dense rest = d;
  rest.out += row * d.out_row;
  if (d.residual)
    rest.residual += row * d.residual_row;
  return rest;
}

void multiply(const Dense& d, const float* x, int64_t stride, int64_t rows) {
  const Kernels& kernel = kernels();
  if (has_rows_for_threads(rows)) {
    const Pieces pieces = Pieces::for_threads(rows, kRows);
    share(pieces.count, kForwards, [&](int64_t i) {
      const int64_t first = pieces.begin(i);
      kernel.dense(from_row(d, first), x + first * stride, stride, pieces.size(i), 0, num_vectors(d.columns));
    });
    return;
  }
  const Strips columns{num_vectors(d.columns), 3};  // a tile's
  share(columns.count(), kForwards, [&](int64_t i) {
    kernel.dense(d, x, stride, rows, columns.begin(i), columns.end(i));
  });
}

}  // namespace

Tensor packed_pointwise(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
    int64_t activation) {
  const Tensor rows = as_rows(x);
  Dense d = dense_of(weight, bias, rows.size(1), activation);
  const Tensor out = new_map(x.size(0), d.columns, x.size(2), x.size(3));
  d.out = out.mutable_data_ptr<float>();
  const Tensor added = residual ? as_rows(*residual) : Tensor();
  if (residual) {
    check_same(added, out, "residual");
    d.residual = added.const_data_ptr<float>();
    d.residual_row = row_stride(added);
  }
  multiply(d, rows.const_data_ptr<float>(), row_stride(rows), num_rows(rows));
  return out;
}

namespace {

// y + second(relu(first(y))) + residual, where y is a depthwise convolution of x, or x itself. Neither y nor the wide
// rows between the two products leave the cache.
struct FeedForward {
  const Kernels& kernel = kernels();
  Dense widen, narrow;
  Depthwise before{};  // without weight: nothing comes before
  Map x{};
  Matrix residual{};  // without data: none

  // Floats of scratch memory.
  int64_t floats_per_pixel() const { return widen.columns + (before.weight ? x.channels : 0); }

  // Pixels of rows [first, last) of the batch, the rows of all maps counted through.
  void rows(int64_t first, int64_t last, float* between) const {
    const int64_t width = x.width, count = (last - first) * width;
    const float* from = x.data + first * width * x.pixel;
    Dense wide = widen, back = from_row(narrow, first * width);
    if (before.weight) {
      float* y = between + count * widen.columns;
      from = back.residual = y;
      for (int64_t i = first; i < last; ++i)
        convolve(y + (i - first) * width * x.channels, i / x.height, i % x.height);
    } else {
      back.residual = from;
    }
    const int64_t stride = before.weight ? x.channels : x.pixel;
    back.residual_row = stride;
    wide.out = between;
    kernel.dense(wide, from, stride, count, 0, num_vectors(wide.columns));
    kernel.dense(back, between, widen.columns, count, 0, num_vectors(back.columns));
    add_residual(first * width, count);
  }

  void add_residual(int64_t first, int64_t count) const {
    for (int64_t row = first; residual.data && row < first + count; ++row)
      add(narrow.out + row * narrow.out_row, residual.at(row), narrow.columns);
  }

  // A row of the depthwise convolution, from its first pixel on to `to`.
  void convolve(float* to, int64_t image, int64_t row) const {
    Depthwise d = before;
    d.x.data += image * d.x.image;
    d.out.data = to - row * d.out.row;
    for (int64_t block = 0; block < kernel.num_blocks(x.channels); ++block)
      kernel.depthwise(d, 0, row, block);
  }
};

Tensor ffn(
    const Tensor& x, const std::optional<Tensor>& taps, const std::optional<Tensor>& taps_bias,
    const Tensor& first_weight, const Tensor& first_bias, const Tensor& second_weight, const Tensor& second_bias,
    const std::optional<Tensor>& residual) {
  const Tensor map = as_rows(x), added = residual ? as_rows(*residual) : Tensor();
  const int64_t C = map.size(1), hidden = first_bias.numel(), rows = num_rows(map);
  const Tensor out = new_like(map);
  FeedForward f;
  f.x = map_of(map);
  f.x.pixel = row_stride(map);
  f.widen = dense_of(first_weight, first_bias, C, kRelu);
  f.narrow = dense_of(second_weight, second_bias, hidden, kNone);
  TORCH_CHECK(f.narrow.columns == C, "the second product must lead back to ", C, " channels, got ", f.narrow.columns);
  f.narrow.out = out.mutable_data_ptr<float>();
  f.narrow.residual = f.x.data;
  if (residual) {
    check_same(added, map, "residual");
    f.residual = matrix_of(added);
  }
  TORCH_CHECK(taps.has_value() == taps_bias.has_value(), "taps and their bias go together");
  if (taps)
    f.before = depthwise_of(map, out, *taps, *taps_bias, 1, taps->size(0) / 2, kNone);
  if (has_rows_for_threads(rows)) {
    const int64_t width = std::max<int64_t>(f.x.width, 1);
    const Pieces lines = Pieces::for_threads(rows / width, std::max<int64_t>(1, kRows / width));
    share_with_scratch(lines.count, lines.largest() * width * f.floats_per_pixel(), [&](int64_t i, float* scratch) {
      f.rows(lines.begin(i), lines.begin(i + 1), scratch);
    });
    return out;
  }
  const Tensor y = taps ? depthwise(map, *taps, *taps_bias, {}, {}, 1, taps->size(0) / 2, kNone) : map;
  const Tensor between = floats(rows * hidden);
  f.widen.out = between.mutable_data_ptr<float>();
  f.narrow.residual = y.const_data_ptr<float>();
  f.narrow.residual_row = row_stride(y);
  multiply(f.widen, f.narrow.residual, row_stride(y), rows);
  multiply(f.narrow, f.widen.out, hidden, rows);
  f.add_residual(0, rows);
  return out;
}

// Over the pixels of each image: (B, C, H, W) to (B, C, 1, 1).
Tensor means(const Tensor& x) {
  const Tensor map = as_rows(x), out = new_map(map.size(0), map.size(1), 1, 1);
  const int64_t C = map.size(1), pixels = map.size(2) * map.size(3);
  const Kernels& kernel = kernels();
  float* mean = out.mutable_data_ptr<float>();
  share(map.size(0), kForwards, [&](int64_t image) {
    kernel.means(matrix_of(map).from(image * pixels), pixels, C, mean + image * C);
  });
  return out;
}

// x times a gate of each channel: sigmoid(expand(relu(reduce(means)))).
Tensor squeeze_excite(
    const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
    const Tensor& expand_bias) {
  const Tensor map = as_rows(x), out = new_like(map);
  const int64_t B = map.size(0), C = map.size(1), pixels = map.size(2) * map.size(3);
  const Kernels& kernel = kernels();
  const Tensor hidden = packed_pointwise(means(map), reduce_weight, reduce_bias, {}, kRelu);
  const Tensor gates = packed_pointwise(hidden, expand_weight, expand_bias, {}, kNone), zeros = at::zeros({C});
  TORCH_CHECK(gates.size(1) == C, "there are ", C, " channels, and gates for ", gates.size(1));
  float* gate = gates.mutable_data_ptr<float>();
  const float* zero = zeros.const_data_ptr<float>();
  share(B, kForwards, [&](int64_t image) {
    float* own = gate + image * C;
    for (int64_t c = 0; c < C; ++c)
      own[c] = 1 / (1 + std::exp(-own[c]));
    const Normalization scale{C, zero, own, zero, kNone};
    kernel.normalize(scale, matrix_of(map).from(image * pixels), Matrix{}, matrix_of(out).from(image * pixels), pixels);
  });
  return out;
}

struct Range {
  int64_t first, last;
};

// Which taps of a kernel that begins at `start` lie on a side of `size` pixels.
Range inside(int64_t start, int64_t side, int64_t size) {
  return {std::max<int64_t>(0, -start), std::min(side, size - start)};
}

// A dense convolution of one image: each row of pixels under the kernel is a piece of a row of the product. Pieces off
// the map are left out; where the kernel reaches over the left or right side, the piece is shorter.
struct Convolution {
  Dense whole;
  Map x{};
  int64_t side, stride, padding, height, width;

  void columns(int64_t row, Range vertical, int64_t first, int64_t last) const {
    const Kernels& kernel = kernels();
    const int64_t top = row * stride - padding, left = first * stride - padding;
    const Range horizontal = inside(left, side, x.width);
    Dense d = from_row(whole, row * width + first);
    const float* from = x.data + (top + vertical.first) * x.row + (left + horizontal.first) * x.pixel;
    d.pieces = vertical.last - vertical.first;
    d.piece_stride = x.row;
    d.depth = (horizontal.last - horizontal.first) * x.channels;
    d.first_row = (vertical.first * side + horizontal.first) * x.channels;
    d.piece_rows = side * x.channels;
    kernel.dense(d, from, stride * x.pixel, last - first, 0, num_vectors(d.columns));
  }

  void row(int64_t row) const {
    const Range vertical = inside(row * stride - padding, side, x.height);
    const int64_t first = std::min(width, (padding + stride - 1) / stride);
    const int64_t last = std::max(first, std::min(width, (x.width - side + padding) / stride + 1));
    for (int64_t column = 0; column < first; ++column)
      columns(row, vertical, column, column + 1);
    if (first < last)
      columns(row, vertical, first, last);
    for (int64_t column = last; column < width; ++column)
      columns(row, vertical, column, column + 1);
  }
};

Convolution convolution_of(
    const Map& map, const Tensor& weight, const Tensor& bias, int64_t side, int64_t stride, int64_t padding,
    Activation activation) {
  return {
      dense_of(weight, bias, side * side * map.channels, activation),
      map,
      side,
      stride,
      padding,
      convolved(map.height, side, stride, padding),
      convolved(map.width, side, stride, padding)};
}

// An image as it comes from a data loader, (B, C, H, W) in any order, to a channels-last map without gaps.
Tensor dense_map(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "a map must be (B, C, H, W) in float32, got ", x.sizes());
  if (x.is_contiguous(at::MemoryFormat::ChannelsLast))
    return x;
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const Tensor out = new_map(x.size(0), C, H, W);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  share(x.size(0) * H, kForwards, [&](int64_t i) {
    const float* row = from + i / H * x.stride(0) + i % H * x.stride(2);
    for (int64_t pixel = 0; pixel < W; ++pixel)
      for (int64_t c = 0; c < C; ++c)
        to[(i * W + pixel) * C + c] = row[c * x.stride(1) + pixel * x.stride(3)];
  });
  return out;
}

Map compact(int64_t channels, int64_t height, int64_t width, float* data) {
  return {height, width, channels, height * width * channels, width * channels, channels, data};
}

// Convolutions one after the other, a ReLU between them, image by image: the maps between them stay in the cache.
Tensor convs(
    const Tensor& x, at::TensorList weights, at::TensorList biases, int64_t side, int64_t stride, int64_t padding) {
  TORCH_CHECK(!weights.empty() && weights.size() == biases.size(), "there must be as many biases as weights");
  const Tensor pixels = dense_map(x);
  const Map map = map_of(pixels);
  std::vector<Convolution> layers;
  int64_t largest = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool is_last = i + 1 == weights.size();
    const Map from =
        i == 0 ? map : compact(layers[i - 1].whole.columns, layers[i - 1].height, layers[i - 1].width, nullptr);
    layers.push_back(convolution_of(from, weights[i], biases[i], side, stride, padding, is_last ? kNone : kRelu));
    if (!is_last)
      largest = std::max(largest, layers[i].height * layers[i].width * layers[i].whole.columns);
  }
  const Convolution& last = layers.back();
  const Tensor out = new_map(x.size(0), last.whole.columns, last.height, last.width);
  float* to = out.mutable_data_ptr<float>();
  const auto run = [&](int64_t image, float* scratch, const auto& for_lines) {
    for (size_t i = 0; i < layers.size(); ++i) {
      Convolution c = layers[i];
      c.x.data = i == 0 ? map.data + image * map.image : scratch + (i + 1) % 2 * largest;
      c.whole.out = scratch + i % 2 * largest;
      if (i + 1 == layers.size())
        c.whole.out = to + image * c.height * c.width * c.whole.columns;
      for_lines(c.height, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          c.row(row);
      });
    }
  };
  if (is_balanced(x.size(0))) {
    share_with_scratch(x.size(0), 2 * largest, [&](int64_t image, float* scratch) {
      run(image, scratch, [](int64_t rows, const auto& body) { body(0, rows); });
    });
    return out;
  }
  const Tensor scratch = floats(2 * largest);
  for (int64_t image = 0; image < x.size(0); ++image)
    run(image, scratch.mutable_data_ptr<float>(), [](int64_t rows, const auto& body) { share_range(rows, 1, body); });
  return out;
}

Tensor traced_pointwise(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
    int64_t activation) {
  return traced_map(x, bias.sym_size(0), x.sym_size(2), x.sym_size(3));
}

Tensor traced_means(const Tensor& x) {
  return traced_map(x, x.sym_size(1), 1, 1);
}

Tensor traced_squeeze_excite(
    const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
    const Tensor& expand_bias) {
  return traced_map(x, x.sym_size(1), x.sym_size(2), x.sym_size(3));
}

Tensor traced_ffn(
    const Tensor& x, const std::optional<Tensor>& taps, const std::optional<Tensor>& taps_bias,
    const Tensor& first_weight, const Tensor& first_bias, const Tensor& second_weight, const Tensor& second_bias,
    const std::optional<Tensor>& residual) {
  return traced_map(x, x.sym_size(1), x.sym_size(2), x.sym_size(3));
}

Tensor traced_convs(
    const Tensor& x, at::TensorList weights, at::TensorList biases, int64_t side, int64_t stride, int64_t padding) {
  c10::SymInt height = x.sym_size(2), width = x.sym_size(3);
  for (size_t i = 0; i < weights.size(); ++i) {
    height = convolved(height, c10::SymInt(side), stride, padding);
    width = convolved(width, c10::SymInt(side), stride, padding);
  }
  return traced_map(x, biases.back().sym_size(0), height, width);
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("pointwise", mobilemamba::OnOwnThreads<mobilemamba::packed_pointwise>::call);
  m.impl("means", mobilemamba::OnOwnThreads<mobilemamba::means>::call);
  m.impl("squeeze_excite", mobilemamba::OnOwnThreads<mobilemamba::squeeze_excite>::call);
  m.impl("ffn", mobilemamba::OnOwnThreads<mobilemamba::ffn>::call);
  m.impl("convs", mobilemamba::OnOwnThreads<mobilemamba::convs>::call);
}

TORCH_LIBRARY_IMPL(mobilemamba_kernels, Meta, m) {
  m.impl("pointwise", mobilemamba::traced_pointwise);
  m.impl("means", mobilemamba::traced_means);
  m.impl("squeeze_excite", mobilemamba::traced_squeeze_excite);
  m.impl("ffn", mobilemamba::traced_ffn);
  m.impl("convs", mobilemamba::traced_convs);
}
