// What the layers are trained with on the CPU: batch normalisation, products, and the gradients of these, of depthwise
// convolutions and of the wavelet branch.
//
// But for PyTorch's matrix products, sums are made in an order that does not depend on the number of threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"
#include "layers/layers.h"
#include "layers/maps.h"
#include "cpu/share.h"

namespace mobilemamba {
namespace {

using at::Tensor;

// Rows are cut into pieces of about this many floats, which stay in the cache from one pass to the next; and into a
// number of pieces that most numbers of threads divide. Threads go backwards over what was just written or read forwards,
// and the other way round: then the end of it is still in the cache.
constexpr int64_t kPiece = 1 << 15;
constexpr int64_t kRound = 16;

Pieces pieces_of(int64_t rows, int64_t channels) {
  return {rows, std::max<int64_t>(1, std::min(rows, (rows * channels / kPiece / kRound + 1) * kRound))};
}

// Memory of this thread, kept from one norm to the next.
float* partial_sums(int64_t count) {
  static thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < count)
    kept.resize(count);
  return kept.data();
}

Matrix matrix_of(const Tensor& map) {
  return {const_cast<float*>(map.const_data_ptr<float>()), row_stride(map)};
}

void check_same(const Tensor& tensor, const Tensor& map, const char* name) {
  TORCH_CHECK(tensor.sizes() == map.sizes(), name, " must be ", map.sizes(), ", got ", tensor.sizes());
}

void check_out(const Tensor& out, const Tensor& map) {
  check_same(out, map, "out");
  TORCH_CHECK(as_rows(out).is_same(out), "out must be channels-last");
}

}  // namespace

void Norm::check(int64_t channels) const {
  TORCH_CHECK(
      statistics.dim() == 2 && statistics.size(1) == channels && statistics.stride(1) == 1, "statistics must be (2, ",
      channels, "), got ", statistics.sizes());
  check_vector(weight, channels, "a norm's weight");
  check_vector(bias, channels, "a norm's bias");
}

Normalization Norm::normalization(float* scale, Activation activation) const {
  const int64_t C = weight.numel();
  const float *mean = statistics.const_data_ptr<float>(), *rstd = mean + statistics.stride(0);
  const float* factor = weight.const_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c)
    scale[c] = factor[c] * rstd[c];
  return {C, mean, scale, bias.const_data_ptr<float>(), activation};
}

Norm Norm::measure(
    const Tensor& x, const Tensor& running_mean, const Tensor& running_var, double momentum, const Tensor& weight,
    const Tensor& bias, double eps) {
  const Tensor map = as_rows(x);
  const int64_t C = map.size(1), rows = num_rows(map);
  const Pieces pieces = pieces_of(rows, C);
  const Tensor statistics = at::empty({2, C}, at::TensorOptions(at::kFloat));
  check_vector(running_mean, C, "running_mean");
  check_vector(running_var, C, "running_var");
  float *means = partial_sums(2 * pieces.count * C), *squares = means + pieces.count * C;
  const Kernels& kernel = kernels();
  share(pieces.count, kBackwards, [&](int64_t i) {
    kernel.moments(matrix_of(map).from(pieces.begin(i)), pieces.size(i), C, means + i * C, squares + i * C);
  });
  // Variances of the pieces and distances between their means add up without cancellation.
  std::vector<double> centre(C), spread(C);
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < C; ++c)
      centre[c] += static_cast<double>(means[i * C + c]) * pieces.size(i) / rows;
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < C; ++c) {
      const double distance = means[i * C + c] - centre[c];
      spread[c] += squares[i * C + c] + distance * distance * pieces.size(i);
    }
  float *mean = statistics.mutable_data_ptr<float>(), *rstd = mean + C;
  float *old_mean = running_mean.mutable_data_ptr<float>(), *old_var = running_var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    mean[c] = static_cast<float>(centre[c]);
    rstd[c] = static_cast<float>(1 / std::sqrt(spread[c] / rows + eps));
    old_mean[c] += static_cast<float>(momentum * (centre[c] - old_mean[c]));
    old_var[c] += static_cast<float>(momentum * (spread[c] / (rows - 1) - old_var[c]));
  }
  return {statistics, weight, bias};
}

void Norm::write(const Tensor& x, Activation activation, const Tensor& residual, const Tensor& out) const {
  const Tensor map = as_rows(x), added = residual.defined() ? as_rows(residual) : residual;
  const int64_t C = map.size(1);
  check(C);
  check_out(out, map);
  if (added.defined())
    check_same(added, map, "residual");
  std::vector<float> scale(C);
  const Normalization n = normalization(scale.data(), activation);
  const Matrix from = matrix_of(map), to = matrix_of(out), below = added.defined() ? matrix_of(added) : Matrix{};
  const Kernels& kernel = kernels();
  const Pieces pieces = pieces_of(num_rows(map), C);
  share(pieces.count, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernel.normalize(n, from.from(row), below.from(row), to.from(row), pieces.size(i));
  });
}

Tensor Norm::operator()(const Tensor& x, Activation activation, const Tensor& residual) const {
  const Tensor out = new_like(x);
  write(x, activation, residual, out);
  return out;
}

Norm::Gradients Norm::backward(
    const Tensor& grad, const Tensor& x, Activation activation, const Tensor& out) const {
  const Tensor map = as_rows(x), gradient = as_rows(grad);
  const int64_t C = map.size(1), rows = num_rows(map);
  const Tensor dx = out.defined() ? out : new_like(map);
  const Pieces pieces = pieces_of(rows, C);
  check(C);
  check_same(gradient, map, "grad");
  check_out(dx, map);
  const Tensor dweight = floats(C), dbias = floats(C);
  float *scale = partial_sums((2 * pieces.count + 3) * C), *offset = scale + C, *slope = offset + C;
  float *sums = slope + C, *products = sums + pieces.count * C;
  const Normalization n = normalization(scale, activation);
  const Matrix from = matrix_of(map), g = matrix_of(gradient), to = matrix_of(dx);
  const Kernels& kernel = kernels();
  share(pieces.count, kBackwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernel.normalize_sums(n, g.from(row), from.from(row), pieces.size(i), sums + i * C, products + i * C);
  });
  std::vector<double> sum(C), product(C);
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < C; ++c) {
      sum[c] += sums[i * C + c];
      product[c] += products[i * C + c];
    }
  const float* rstd = statistics.const_data_ptr<float>() + statistics.stride(0);
  float *to_weight = dweight.mutable_data_ptr<float>(), *to_bias = dbias.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    const double r = rstd[c];
    to_bias[c] = static_cast<float>(sum[c]);
    to_weight[c] = static_cast<float>(product[c] * r);
    offset[c] = static_cast<float>(-scale[c] * sum[c] / rows);
    slope[c] = static_cast<float>(-scale[c] * product[c] * r * r / rows);
  }
  share(pieces.count, kForwards, [&](int64_t i) {
    const int64_t row = pieces.begin(i);
    kernel.normalize_backward(n, offset, slope, g.from(row), from.from(row), to.from(row), pieces.size(i));
  });
  return {dx, dweight, dbias};
}

namespace {

// Products with a weight (C', C, 1, 1) are PyTorch's own, of the pixels as rows.
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

// A depthwise weight (C, 1, H, W) as the kernels read it, (H, W, C).
static Tensor taps_of(const Tensor& weight) {
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3),
      "a depthwise weight must be (C, 1, side, side), got ", weight.sizes());
  return weight.squeeze(1).permute({1, 2, 0}).contiguous();
}

Tensor convolve(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, Activation activation) {
  const Tensor added = bias.defined() ? bias : at::zeros({x.size(1)}, at::TensorOptions(at::kFloat));
  return depthwise(x, taps_of(weight), added, {}, {}, stride, weight.size(2) / 2, activation);
}

Gradients convolve_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride, const Tensor& base) {
  const Tensor map = channels_last(x), gradient = channels_last(grad);
  const Tensor below = base.defined() ? channels_last(base) : base;
  const Tensor taps = taps_of(weight);
  const int64_t B = map.size(0), C = map.size(1), H = map.size(2), side = taps.size(0), padding = side / 2;
  check_vector(taps, side * side * C, "weight");
  TORCH_CHECK(
      gradient.size(0) == B && gradient.size(1) == C && gradient.size(2) == convolved(H, side, stride, padding) &&
          gradient.size(3) == convolved(map.size(3), side, stride, padding),
      "grad does not fit to x: ", gradient.sizes());
  if (below.defined())
    check_same(below, map, "base");
  const Tensor dx = new_like(map), dtaps = at::empty({side, side, C}, at::TensorOptions(at::kFloat));
  const DepthwiseGradient d{map_of(gradient), map_of(map), map_of(dx), below.defined() ? map_of(below) : Map{},
                            side, stride, padding, taps.const_data_ptr<float>()};
  const Kernels& kernel = kernels();
  sum_images(B, kernel.num_blocks(C), dtaps.numel(), dtaps.mutable_data_ptr<float>(), 0,
             [&](int64_t first, int64_t last, int64_t block, float* sums, float*) {
               for (int64_t image = first; image < last; ++image) {
                 for (int64_t row = 0; row < H; ++row)
                   kernel.depthwise_input(d, image, row, block);
                 kernel.depthwise_taps(d, image, block, sums);
               }
             });
  return {dx, dtaps.permute({2, 0, 1}).contiguous().view(weight.sizes())};
}

Tensor wavelet_taps(const Tensor& grad, const Tensor& x, int64_t side) {
  const Tensor map = channels_last(x), gradient = channels_last(grad);
  check_same(gradient, map, "grad");
  const int64_t C = map.size(1);
  const Tensor dweight = at::empty({side, side, 4 * C}, at::TensorOptions(at::kFloat));
  const WaveletGradient w{map_of(gradient), map_of(map), side};
  const Kernels& kernel = kernels();
  sum_images(map.size(0), (C + kernel.lanes - 1) / kernel.lanes, dweight.numel(), dweight.mutable_data_ptr<float>(),
             kernel.wavelet_work_size(map.size(2), map.size(3), side),
             [&](int64_t first, int64_t last, int64_t unit, float* sums, float* work) {
               for (int64_t image = first; image < last; ++image)
                 kernel.wavelet_taps(w, image, unit * kernel.lanes, sums, work);
             });
  return dweight;
}

}  // namespace mobilemamba
