// The layers of a folded network: products with bias, activation and residual, feed-forwards, squeeze-excite, the
// stem's convolutions. The mixer is in mixer.cpp.
#include <ATen/core/Tensor.h>
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

Dense dense_of(const Tensor& weight, const Tensor& bias, int64_t depth, Activation activation) {
  Dense d;
  d.depth = depth;
  d.columns = d.out_row = bias.numel();
  check_vector(bias, d.columns, "bias");
  d.weight = weight_of(weight, depth, d.columns);
  d.bias = bias.const_data_ptr<float>();
  d.activation = activation;
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
      kernel.dense(from_row(d, first), x + first * stride, stride, pieces.size(i), 0, num_panels(d.columns));
    });
    return;
  }
  share(num_panels(d.columns), kForwards, [&](int64_t i) { kernel.dense(d, x, stride, rows, i, i + 1); });
}

}  // namespace

void pointwise_into(
    const Map& x, int64_t images, const Tensor& weight, const Tensor& bias, const Matrix& residual,
    Activation activation, const Map& out) {
  Dense d = dense_of(weight, bias, x.channels, activation);
  TORCH_CHECK(d.columns == out.channels, "there are ", out.channels, " channels, and a bias for ", d.columns);
  d.out = out.data, d.out_row = out.pixel;
  d.residual = residual.data, d.residual_row = residual.stride;
  multiply(d, x.data, x.pixel, images * x.height * x.width);
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
    kernel.dense(wide, from, stride, count, 0, num_panels(wide.columns));
    kernel.dense(back, between, widen.columns, count, 0, num_panels(back.columns));
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

}  // namespace

void ffn_into(const Map& x, int64_t images, at::TensorList p, const Matrix& residual, const Map& out) {
  TORCH_CHECK(p.size() == kFfnParameters, p.size(), " parameters of a feed-forward instead of ", kFfnParameters + 0);
  const Tensor &taps = p[0], &taps_bias = p[1];
  TORCH_CHECK(taps.defined() == taps_bias.defined(), "taps and their bias go together");
  const int64_t C = x.channels, hidden = p[3].numel(), rows = images * x.height * x.width;
  FeedForward f;
  f.x = x;
  f.widen = dense_of(p[2], p[3], C, kRelu);
  f.narrow = dense_of(p[4], p[5], hidden, kNone);
  TORCH_CHECK(f.narrow.columns == C, "the second product must lead back to ", C, " channels, got ", f.narrow.columns);
  f.narrow.out = out.data, f.narrow.out_row = out.pixel;
  f.residual = residual;
  if (taps.defined())
    f.before = depthwise_of(x, out, taps, taps_bias, 1, taps.size(0) / 2, kNone);
  if (has_rows_for_threads(rows)) {
    const int64_t width = std::max<int64_t>(x.width, 1);
    const Pieces lines = Pieces::for_threads(rows / width, std::max<int64_t>(1, kRows / width));
    share_with_scratch(lines.count, lines.largest() * width * f.floats_per_pixel(), [&](int64_t i, float* scratch) {
      f.rows(lines.begin(i), lines.begin(i + 1), scratch);
    });
    return;
  }
  const Tensor scratch = floats(rows * f.floats_per_pixel());
  float* between = scratch.mutable_data_ptr<float>();
  Map y = x;
  if (taps.defined()) {
    y = map_without_gaps(x.height, x.width, C, between + rows * hidden);
    f.before.out = y;
    run(f.before, images);
  }
  f.widen.out = between;
  f.narrow.residual = y.data, f.narrow.residual_row = y.pixel;
  multiply(f.widen, y.data, y.pixel, rows);
  multiply(f.narrow, between, hidden, rows);
  f.add_residual(0, rows);
}

void means_into(const Map& x, int64_t images, float* mean) {
  const Kernels& kernel = kernels();
  share(images, kForwards, [&](int64_t image) {
    kernel.means({x.data + image * x.image, x.pixel}, x.height * x.width, x.channels, mean + image * x.channels);
  });
}

void squeeze_excite_into(const Map& x, int64_t images, at::TensorList p, const Map& out) {
  TORCH_CHECK(
      p.size() == kSqueezeExciteParameters, p.size(), " parameters of squeeze-excite instead of ",
      kSqueezeExciteParameters + 0);
  const int64_t C = x.channels, hidden = p[1].numel();
  const Tensor scratch = floats(images * (2 * C + hidden) + C);
  float *mean = scratch.mutable_data_ptr<float>(), *gate = mean + images * C, *zero = gate + images * C;
  const Map means = map_without_gaps(1, 1, C, mean), gates = map_without_gaps(1, 1, C, gate);
  const Map reduced = map_without_gaps(1, 1, hidden, zero + C);
  std::fill_n(zero, C, 0.f);
  means_into(x, images, mean);
  pointwise_into(means, images, p[0], p[1], {}, kRelu, reduced);
  pointwise_into(reduced, images, p[2], p[3], {}, kNone, gates);
  const Kernels& kernel = kernels();
  share(images, kForwards, [&](int64_t image) {
    float* own = gate + image * C;
    for (int64_t c = 0; c < C; ++c)
      own[c] = 1 / (1 + std::exp(-own[c]));
    const Map from = from_image(x, image), to = from_image(out, image);
    const Normalization scale{C, zero, own, zero, kNone};
    kernel.normalize(scale, {from.data, from.pixel}, {}, {to.data, to.pixel}, x.height * x.width);
  });
}

namespace {

Tensor pointwise(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
    int64_t activation) {
  const Tensor map = as_rows(x), out = new_map(x.size(0), bias.numel(), x.size(2), x.size(3));
  const Tensor added = residual ? as_rows(*residual) : Tensor();
  if (residual)
    check_same(added, out, "residual");
  pointwise_into(
      rows_of(map), map.size(0), weight, bias, residual ? matrix_of(added) : Matrix{}, activation_of(activation),
      rows_of(out));
  return out;
}

Tensor ffn(
    const Tensor& x, const std::optional<Tensor>& taps, const std::optional<Tensor>& taps_bias,
    const Tensor& first_weight, const Tensor& first_bias, const Tensor& second_weight, const Tensor& second_bias,
    const std::optional<Tensor>& residual) {
  const Tensor map = as_rows(x), added = residual ? as_rows(*residual) : Tensor(), out = new_like(map);
  if (residual)
    check_same(added, map, "residual");
  const Tensor parameters[] = {
      taps.value_or(Tensor()), taps_bias.value_or(Tensor()), first_weight, first_bias, second_weight, second_bias};
  ffn_into(rows_of(map), map.size(0), parameters, residual ? matrix_of(added) : Matrix{}, rows_of(out));
  return out;
}

// Over the pixels of each image: (B, C, H, W) to (B, C, 1, 1).
Tensor means(const Tensor& x) {
  const Tensor map = as_rows(x), out = new_map(map.size(0), map.size(1), 1, 1);
  means_into(rows_of(map), map.size(0), out.mutable_data_ptr<float>());
  return out;
}

// x times a gate of each channel: sigmoid(expand(relu(reduce(means)))).
Tensor squeeze_excite(
    const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
    const Tensor& expand_bias) {
  const Tensor map = as_rows(x), out = new_like(map);
  const Tensor parameters[] = {reduce_weight, reduce_bias, expand_weight, expand_bias};
  squeeze_excite_into(rows_of(map), map.size(0), parameters, rows_of(out));
  return out;
}

// A map with zeros left and right of its rows: as many pixels as a kernel reaches over either side, which two rows
// share.
Map map_with_zeros(int64_t height, int64_t width, int64_t channels, int64_t reach, float* data) {
  const int64_t row = (width + reach) * channels;
  return {height, width, channels, height * row + reach * channels, row, channels, data + reach * channels};
}

void write_zeros(const Map& x, int64_t row, int64_t reach) {
  const int64_t count = reach * x.channels;
  std::fill_n(x.data + row * x.row - count, count, 0.f);
  std::fill_n(x.data + row * x.row + x.width * x.channels, count, 0.f);
}

// A dense convolution of one image, with zeros beside its rows: each row of pixels under the kernel is a piece of a row
// of the product. Pieces above and below the map are left out.
struct Convolution {
  Dense whole;
  Map x{}, out{};
  int64_t side, stride, padding;

  void row(int64_t row) const {
    const int64_t top = row * stride - padding;
    const int64_t first = std::max<int64_t>(0, -top), last = std::min(side, x.height - top);
    Dense d = whole;
    d.out = out.data + row * out.row, d.out_row = out.pixel;
    d.pieces = last - first, d.piece_stride = x.row;
    d.depth = d.piece_rows = side * x.channels;
    d.first_row = first * d.depth;
    const float* from = x.data + (top + first) * x.row - padding * x.pixel;
    kernels().dense(d, from, stride * x.pixel, out.width, 0, num_panels(d.columns));
  }
};

// A row of an image as it comes from a data loader, channel by channel or in any other order.
void read_row(const Tensor& x, int64_t image, int64_t row, const Map& to) {
  const float* from = x.const_data_ptr<float>() + image * x.stride(0) + row * x.stride(2);
  const int64_t step = x.stride(3);
  for (int64_t c = 0; c < to.channels; ++c, from += x.stride(1)) {
    float* pixel = to.data + row * to.row + c;
    for (int64_t i = 0; i < to.width; ++i, pixel += to.channels)
      *pixel = from[i * step];
  }
}

}  // namespace

Map convs_shape(const Tensor& x, at::TensorList biases, int64_t side, int64_t stride, int64_t padding) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "a map must be (B, C, H, W) in float32, got ", x.sizes());
  TORCH_CHECK(!biases.empty(), "there must be a convolution");
  int64_t height = x.size(2), width = x.size(3);
  for (size_t i = 0; i < biases.size(); ++i) {
    height = convolved(height, side, stride, padding);
    width = convolved(width, side, stride, padding);
  }
  return map_without_gaps(height, width, biases.back().numel(), nullptr);
}

// Image by image: the maps between the convolutions stay in the cache.
void convs_into(
    const Tensor& x, at::TensorList weights, at::TensorList biases, int64_t side, int64_t stride, int64_t padding,
    const Map& out) {
  TORCH_CHECK(weights.size() == biases.size(), "there must be as many biases as weights");
  const int64_t images = x.size(0);
  // The map before each convolution, and the last one's.
  std::vector<Map> maps{map_with_zeros(x.size(2), x.size(3), x.size(1), padding, nullptr)};
  std::vector<Convolution> layers;
  int64_t largest = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Map from = maps.back();
    const int64_t columns = biases[i].numel();
    const Activation activation = i + 1 == weights.size() ? kNone : kRelu;
    const Dense whole = dense_of(weights[i], biases[i], side * side * from.channels, activation);
    layers.push_back({whole, {}, {}, side, stride, padding});
    largest = std::max(largest, from.image + padding * from.channels);
    const int64_t height = convolved(from.height, side, stride, padding);
    maps.push_back(map_with_zeros(height, convolved(from.width, side, stride, padding), columns, padding, nullptr));
  }
  const auto run = [&](int64_t image, float* scratch, const auto& for_rows) {
    const auto at = [&](size_t i) {
      Map map = maps[i];
      map.data = scratch + i % 2 * largest + padding * map.channels;
      return i < layers.size() ? map : from_image(out, image);
    };
    const Map pixels = at(0);
    for_rows(pixels.height, [&](int64_t row) {
      read_row(x, image, row, pixels);
      write_zeros(pixels, row, padding);
    });
    for (size_t i = 0; i < layers.size(); ++i) {
      Convolution c = layers[i];
      c.x = at(i), c.out = at(i + 1);
      for_rows(c.out.height, [&](int64_t row) {
        c.row(row);
        if (i + 1 < layers.size())
          write_zeros(c.out, row, padding);
      });
    }
  };
  if (is_balanced(images)) {
    share_with_scratch(images, 2 * largest, [&](int64_t image, float* scratch) {
      run(image, scratch, [](int64_t rows, const auto& body) {
        for (int64_t row = 0; row < rows; ++row)
          body(row);
      });
    });
    return;
  }
  const Tensor scratch = floats(2 * largest);
  for (int64_t image = 0; image < images; ++image)
    run(image, scratch.mutable_data_ptr<float>(), [](int64_t rows, const auto& body) {
      share_range(rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          body(row);
      });
    });
}

namespace {

Tensor convs(
    const Tensor& x, at::TensorList weights, at::TensorList biases, int64_t side, int64_t stride, int64_t padding) {
  const Map shape = convs_shape(x, biases, side, stride, padding);
  const Tensor out = new_map(x.size(0), shape.channels, shape.height, shape.width);
  convs_into(x, weights, biases, side, stride, padding, rows_of(out));
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
  m.impl("pointwise", mobilemamba::OnOwnThreads<mobilemamba::pointwise>::call);
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
