// Gradients of depthwise convolutions and of the wavelet branch. In float32; maps are channels-last.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu_dispatch.h"
#include "cpu_maps.h"
#include "cpu_norm.h"

namespace mobilemamba {
namespace {

using at::Tensor;

// A depthwise weight (C, 1, H, W) as the kernels read it, (H, W, C).
Tensor taps_of(const Tensor& weight) {
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3),
      "a depthwise weight must be (C, 1, side, side), got ", weight.sizes());
  return weight.squeeze(1).permute({1, 2, 0}).contiguous();
}

std::tuple<Tensor, Tensor> depthwise_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride, const std::optional<Tensor>& base) {
  const Tensor map = channels_last(x), gradient = channels_last(grad), below = base ? channels_last(*base) : Tensor();
  const Tensor taps = taps_of(weight);
  const int64_t B = map.size(0), C = map.size(1), H = map.size(2), side = taps.size(0), padding = side / 2;
  check_vector(taps, side * side * C, "weight");
  TORCH_CHECK(
      gradient.size(0) == B && gradient.size(1) == C && gradient.size(2) == convolved(H, side, stride, padding) &&
          gradient.size(3) == convolved(map.size(3), side, stride, padding),
      "grad does not fit to x: ", gradient.sizes());
  if (base)
    check_same(below, map, "base");
  const Tensor dx = new_map(B, C, H, map.size(3)), dtaps = at::empty({side, side, C}, at::TensorOptions(at::kFloat));
  const DepthwiseGradient d{map_of(gradient), map_of(map), map_of(dx), base ? map_of(below) : Map{},
                            side, stride, padding, taps.const_data_ptr<float>()};
  const Kernels& kernel = kernels();
  sum_images(B, kernel.num_blocks(C), dtaps.numel(), dtaps.mutable_data_ptr<float>(),
             [&](int64_t first, int64_t last, int64_t block, float* sums) {
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
             [&](int64_t first, int64_t last, int64_t unit, float* sums) {
               const Tensor work = floats(kernel.wavelet_work_size(map.size(2), map.size(3), side));
               for (int64_t image = first; image < last; ++image)
                 kernel.wavelet_taps(w, image, unit * kernel.lanes, sums, work.mutable_data_ptr<float>());
             });
  return dweight;
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("depthwise_backward", mobilemamba::depthwise_backward);
  m.impl("wavelet_taps", mobilemamba::wavelet_taps);
}
