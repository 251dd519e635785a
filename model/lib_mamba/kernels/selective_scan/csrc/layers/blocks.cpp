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
constexpr int64_t kStride = 2;   // of a downsampling

// Calls `body(first image, count)`.
template <class Body>
void share_images(const Map& map, int64_t images, const Body& body) {
  const int64_t pixels = std::max<int64_t>(1, map.height * map.width);
  const Strips strips{images, ceil_div(kPixels, pixels)};
  if (is_balanced(strips.count()))
    share(strips.count(), kForwards, [&](int64_t i) { body(strips.begin(i), strips.end(i) - strips.begin(i)); });
  else
    body(0, images);
}

}  // namespace

void block_into(
    const Map& x, int64_t images, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps,
    const Map& out) {
  TORCH_CHECK(p.size() == kBlockParameters, p.size(), " parameters of a block instead of ", kBlockParameters + 0);
  const auto first = p.slice(0, kFfnParameters), mixer = p.slice(kFfnParameters, kMixerParameters);
  const auto second = p.slice(kFfnParameters + kMixerParameters);
  share_images(x, images, [&](int64_t image, int64_t count) {
    const Map from = from_image(x, image), to = from_image(out, image);
    const Tensor scratch = floats(count * to.height * to.width * to.channels);
    const Map between = map_without_gaps(to.height, to.width, to.channels, scratch.mutable_data_ptr<float>());
    ffn_into(from, count, first, {}, to);
    mixer_into(to, count, mixer, split, reverse, norm_eps, between);
    ffn_into(between, count, second, {from.data, from.pixel}, to);
  });
}

Map patch_merging_shape(const Map& x, at::TensorList p) {
  TORCH_CHECK(
      p.size() == kPatchMergingParameters, p.size(), " parameters of a downsampling instead of ",
      kPatchMergingParameters + 0);
  const int64_t side = p[2].size(0);
  const int64_t height = convolved(x.height, side, kStride, side / 2);
  return map_without_gaps(height, convolved(x.width, side, kStride, side / 2), p.back().numel(), nullptr);
}

void patch_merging_into(const Map& x, int64_t images, at::TensorList p, const Map& out) {
  const Tensor& taps = p[2];
  const int64_t padding = taps.size(0) / 2, hidden = p[1].numel();
  share_images(out, images, [&](int64_t image, int64_t count) {
    const int64_t size = count * x.height * x.width * hidden;
    const Tensor scratch = floats(size + count * out.height * out.width * hidden);
    float* data = scratch.mutable_data_ptr<float>();
    const Map wide = map_without_gaps(x.height, x.width, hidden, data);
    const Map strided = map_without_gaps(out.height, out.width, hidden, data + size);
    pointwise_into(from_image(x, image), count, p[0], p[1], {}, kRelu, wide);
    run(depthwise_of(wide, strided, taps, p[3], kStride, padding, kRelu), count);
    squeeze_excite_into(strided, count, p.slice(4, kSqueezeExciteParameters), strided);
    pointwise_into(strided, count, p[8], p[9], {}, kNone, from_image(out, image));
  });
}

namespace {

Tensor block(const Tensor& x, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps) {
  const Tensor map = as_rows(x), out = new_like(map);
  block_into(rows_of(map), map.size(0), p, split, reverse, norm_eps, rows_of(out));
  return out;
}

Tensor patch_merging(const Tensor& x, at::TensorList p) {
  const Tensor map = as_rows(x);
  const Map from = rows_of(map), to = patch_merging_shape(from, p);
  const Tensor out = new_map(map.size(0), to.channels, to.height, to.width);
  patch_merging_into(from, map.size(0), p, rows_of(out));
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
