// Depthwise convolutions and the wavelet branch, in inference and in training, and their gradients.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

#include "cpu/dispatch.h"
#include "cpu/share.h"
#include "layers/layers.h"
#include "layers/maps.h"
#include "layers/weights.h"

namespace mobilemamba {

using at::Tensor;

Depthwise depthwise_of(
    const Map& x, const Map& out, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
    int64_t activation) {
  const int64_t C = x.channels, side = weight.size(0);
  check_vector(weight, side * side * C, "weight");
  check_vector(bias, C, "bias");
  return {
      x,
      out,
      side,
      stride,
      padding,
      weight.const_data_ptr<float>(),
      bias.const_data_ptr<float>(),
      activation_of(activation),
      nullptr,
      nullptr};
}

void run(const Depthwise& d, int64_t images) {
  const Kernels& kernel = kernels();
  const int64_t blocks = kernel.num_blocks(d.x.channels), height = d.out.height;
  share(images * height, kForwards, [&](int64_t i) {
    for (int64_t block = 0; block < blocks; ++block)
      kernel.depthwise(d, i / height, i % height, block);
  });
}

void scale_and_shift(Depthwise& d, const Tensor& scale, const Tensor& shift) {
  check_vector(scale, d.x.channels, "scale");
  check_vector(shift, d.x.channels, "shift");
  d.scale = scale.const_data_ptr<float>(), d.shift = shift.const_data_ptr<float>();
}

Tensor depthwise(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t stride, int64_t padding, int64_t activation) {
  const int64_t side = weight.size(0);
  const Tensor map = channels_last(x);
  const Tensor out = new_map(
      x.size(0), x.size(1), convolved(x.size(2), side, stride, padding), convolved(x.size(3), side, stride, padding));
  Depthwise d = depthwise_of(map_of(map), map_of(out), weight, bias, stride, padding, activation);
  TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift go together");
  if (scale)
    scale_and_shift(d, *scale, *shift);
  run(d, map.size(0));
  return out;
}

Tensor convolve(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, Activation activation) {
  const Tensor added = bias.defined() ? bias : at::zeros({x.size(1)}, at::TensorOptions(at::kFloat));
  return depthwise(x, pack_depthwise(weight), added, {}, {}, stride, weight.size(2) / 2, activation);
}

Gradients convolve_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride, const Tensor& base, const Tensor& out) {
  const Tensor map = channels_last(x), gradient = channels_last(grad);
  const Tensor below = base.defined() ? channels_last(base) : base;
  const Tensor packed = pack_depthwise(weight);
  const int64_t B = map.size(0), C = map.size(1), H = map.size(2), side = packed.size(0), padding = side / 2;
  check_vector(packed, side * side * C, "weight");
  TORCH_CHECK(
      gradient.size(0) == B && gradient.size(1) == C && gradient.size(2) == convolved(H, side, stride, padding) &&
          gradient.size(3) == convolved(map.size(3), side, stride, padding),
      "grad does not fit to x: ", gradient.sizes());
  if (below.defined())
    check_same(below, map, "base");
  const Tensor dx = out.defined() ? out : new_like(map);
  check_same(dx, map, "out");
  const Tensor dweight = at::empty({side, side, C}, at::TensorOptions(at::kFloat));
  const DepthwiseGradient d{
      map_of(gradient),
      map_of(map),
      map_of(dx),
      below.defined() ? map_of(below) : Map{},
      side,
      stride,
      padding,
      packed.const_data_ptr<float>()};
  const Kernels& kernel = kernels();
  sum_images(
      B, kernel.num_blocks(C), dweight.numel(), dweight.mutable_data_ptr<float>(), 0,
      [&](int64_t first, int64_t last, int64_t block, float* sums, float*) {
        for (int64_t image = first; image < last; ++image) {
          for (int64_t row = 0; row < H; ++row)
            kernel.depthwise_input_gradient(d, image, row, block);
          kernel.depthwise_weight_gradient(d, image, block, sums);
        }
      });
  return {dx, unpack_depthwise(dweight)};
}

void wavelet_into(
    const Map& x, int64_t images, const Tensor& weight, const Map& base, Activation activation, const Map& out) {
  const int64_t side = weight.size(0);
  check_vector(weight, side * side * 4 * x.channels, "weight");
  const Wavelet w{x, base, out, side, weight.const_data_ptr<float>(), activation};
  const Kernels& kernel = kernels();
  const int64_t vectors = num_vectors(x.channels);
  share_with_scratch(images * vectors, kernel.wavelet_work_size(x.height, x.width, side), [&](int64_t i, float* work) {
    kernel.wavelet(w, i / vectors, i % vectors * kernel.lanes, work);
  });
}

Tensor wavelet(const Tensor& x, const Tensor& weight, const Tensor& base) {
  const Tensor map = channels_last(x), below = channels_last(base), out = new_like(x);
  check_same(below, map, "base");
  wavelet_into(map_of(map), map.size(0), weight, map_of(below), kNone, map_of(out));
  return out;
}

Tensor wavelet_weight_gradient(const Tensor& grad, const Tensor& x, int64_t side) {
  const Tensor map = channels_last(x), gradient = channels_last(grad);
  check_same(gradient, map, "grad");
  const int64_t C = map.size(1);
  const Tensor dweight = at::empty({side, side, 4 * C}, at::TensorOptions(at::kFloat));
  const WaveletGradient w{map_of(gradient), map_of(map), side};
  const Kernels& kernel = kernels();
  sum_images(
      map.size(0), num_vectors(C), dweight.numel(), dweight.mutable_data_ptr<float>(),
      kernel.wavelet_work_size(map.size(2), map.size(3), side),
      [&](int64_t first, int64_t last, int64_t unit, float* sums, float* work) {
        for (int64_t image = first; image < last; ++image)
          kernel.wavelet_weight_gradient(w, image, unit * kernel.lanes, sums, work);
      });
  return dweight;
}

namespace {

Tensor traced_depthwise(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t stride, int64_t padding, int64_t activation) {
  const c10::SymInt side = weight.sym_size(0), height = convolved(x.sym_size(2), side, stride, padding);
  return traced_map(x, x.sym_size(1), height, convolved(x.sym_size(3), side, stride, padding));
}

Tensor traced_wavelet(const Tensor& x, const Tensor& weight, const Tensor& base) {
  return traced_map(x, x.sym_size(1), x.sym_size(2), x.sym_size(3));
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("depthwise", mobilemamba::OnOwnThreads<mobilemamba::depthwise>::call);
  m.impl("wavelet", mobilemamba::OnOwnThreads<mobilemamba::wavelet>::call);
}

TORCH_LIBRARY_IMPL(mobilemamba_kernels, Meta, m) {
  m.impl("depthwise", mobilemamba::traced_depthwise);
  m.impl("wavelet", mobilemamba::traced_wavelet);
}
