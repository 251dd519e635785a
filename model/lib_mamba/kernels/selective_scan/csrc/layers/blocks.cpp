// Groups of layers of a folded network as one operator each: the block, and the downsampling between two stages.
//
// Where there are many images, a thread takes a few of them through the whole group: the maps between its layers stay
// in the cache, and threads meet once. Where there are few, every layer is divided among the threads.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/share.h"
#include "layers/layers.h"
#include "layers/maps.h"

namespace mobilemamba {
namespace {

using at::Tensor;

constexpr int64_t kPixels = 64;  // at least, at a time: less is not worth fetching the weights

// Calls `body(first image, count)`.
template <class Body>
void share_images(const Tensor& map, const Body& body) {
  const int64_t images = map.size(0), pixels = std::max<int64_t>(1, map.size(2) * map.size(3));
  const Strips strips{images, ceil_div(kPixels, pixels)};
  if (is_balanced(strips.count()))
    share(strips.count(), kForwards, [&](int64_t i) { body(strips.begin(i), strips.end(i) - strips.begin(i)); });
  else
    body(0, images);
}

// A feed-forward, the mixer, and another feed-forward, with the residual around them all. Parameters: of each in turn.
Tensor block(const Tensor& x, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps) {
  constexpr int64_t kNumParameters = 2 * kFfnParameters + kMixerParameters;
  TORCH_CHECK(p.size() == kNumParameters, p.size(), " parameters of a block instead of ", kNumParameters + 0);
  const auto first = p.slice(0, kFfnParameters), mixer = p.slice(kFfnParameters, kMixerParameters);
  const auto second = p.slice(kFfnParameters + kMixerParameters);
  const Tensor map = as_rows(x), out = new_like(map);
  const Map from = rows_of(map), to = rows_of(out);
  share_images(map, [&](int64_t image, int64_t count) {
    const Map x_in = from_image(from, image), y_out = from_image(to, image);
    const Tensor scratch = floats(count * to.image);
    const Map between = map_without_gaps(to.height, to.width, to.channels, scratch.mutable_data_ptr<float>());
    ffn_into(x_in, count, first, {}, y_out);
    mixer_into(y_out, count, mixer, split, reverse, norm_eps, between);
    ffn_into(between, count, second, {x_in.data, x_in.pixel}, y_out);
  });
  return out;
}

// Inverted bottleneck of stride 2 with squeeze-excite. Parameters: weight and bias of the product that widens, taps and
// bias of the depthwise convolution, those of squeeze-excite, weight and bias of the product that narrows.
Tensor patch_merging(const Tensor& x, at::TensorList p) {
  constexpr int64_t kNumParameters = 6 + kSqueezeExciteParameters, kStride = 2;
  TORCH_CHECK(p.size() == kNumParameters, p.size(), " parameters of a downsampling instead of ", kNumParameters + 0);
  const Tensor map = as_rows(x), &taps = p[2];
  const int64_t side = taps.size(0), hidden = p[1].numel();
  const int64_t height = convolved(map.size(2), side, kStride, side / 2);
  const int64_t width = convolved(map.size(3), side, kStride, side / 2);
  const Tensor out = new_map(map.size(0), p.back().numel(), height, width);
  const Map from = rows_of(map), to = rows_of(out);
  share_images(out, [&](int64_t image, int64_t count) {
    const int64_t size = count * from.height * from.width * hidden;
    const Tensor scratch = floats(size + count * height * width * hidden);
    float* data = scratch.mutable_data_ptr<float>();
    const Map wide = map_without_gaps(from.height, from.width, hidden, data);
    const Map strided = map_without_gaps(height, width, hidden, data + size);
    pointwise_into(from_image(from, image), count, p[0], p[1], {}, kRelu, wide);
    run(depthwise_of(wide, strided, taps, p[3], kStride, side / 2, kRelu), count);
    squeeze_excite_into(strided, count, p.slice(4, kSqueezeExciteParameters), strided);
    pointwise_into(strided, count, p[8], p[9], {}, kNone, from_image(to, image));
  });
  return out;
}

Tensor traced_block(
    const Tensor& x, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps) {
  return traced_map(x, x.sym_size(1), x.sym_size(2), x.sym_size(3));
}

Tensor traced_patch_merging(const Tensor& x, at::TensorList p) {
  const c10::SymInt side = p[2].sym_size(0), padding = side / 2;
  const auto strided = [&](const c10::SymInt& size) { return (size + 2 * padding - side) / 2 + 1; };
  return traced_map(x, p.back().sym_size(0), strided(x.sym_size(2)), strided(x.sym_size(3)));
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("block", mobilemamba::OnOwnThreads<mobilemamba::block>::call);
  m.impl("patch_merging", mobilemamba::OnOwnThreads<mobilemamba::patch_merging>::call);
}

TORCH_LIBRARY_IMPL(mobilemamba_kernels, Meta, m) {
  m.impl("block", mobilemamba::traced_block);
  m.impl("patch_merging", mobilemamba::traced_patch_merging);
}
