// The residual mixer of a folded network: SS2D and the wavelet branch on some channels, MK-DeConv on others, the rest
// as they are; a ReLU, a projection of all. The branches write their channels of one map.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/share.h"
#include "layers/layers.h"
#include "layers/maps.h"
#include "scan/scan.h"

namespace mobilemamba {
namespace {

using at::Tensor;

// The parameters, in their order. Weights are packed (layers/weights.h).
enum Parameter {
  // SS2D
  kInWeight,  // C to 2D
  kInBias,
  kConvWeight,  // depthwise, of D
  kConvBias,
  kXWeight,  // D to K (R + 2N)
  kXBias,
  kDtWeight,  // (K, D, R)
  kDtBias,    // (K, D)
  kALog,      // (K * D, N)
  kDSkip,     // (K * D)
  kNormWeight,
  kNormBias,
  kOutWeight,  // D to C
  kOutBias,
  // Wavelet branch.
  kBandWeight,
  // MK-DeConv; none without local channels.
  kLocalWeight,
  kLocalBias,
  kLocalScale,
  kLocalShift,
  // The projection of all channels.
  kProjWeight,
  kProjBias,
  kNumParameters,
};

static_assert(kNumParameters == kMixerParameters);

void relu_into(const Map& x, int64_t images, const Map& out) {
  share_range(images * x.height * x.width, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < x.channels; ++c)
        out.data[row * out.pixel + c] = std::max(x.data[row * x.pixel + c], 0.f);
  });
}

}  // namespace

void mixer_into(
    const Map& x, int64_t images, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps,
    const Map& out) {
  TORCH_CHECK(p.size() == kNumParameters, p.size(), " parameters instead of ", kNumParameters + 0);
  TORCH_CHECK(split.size() == 3, "split must have three parts, got ", split);
  const int64_t global = split[0], local = split[1], rest = split[2], side = p[kLocalWeight].size(0);
  TORCH_CHECK(global + local + rest == x.channels, "split must add up to ", x.channels, " channels, got ", split);
  const int64_t inner = p[kInBias].numel() / 2, conv_side = p[kConvWeight].size(0);
  const int64_t width = p[kXBias].numel(), pixels = images * x.height * x.width;
  const Tensor scratch = floats(pixels * (4 * inner + width + global + x.channels));
  float* next = scratch.mutable_data_ptr<float>();
  const auto new_map = [&](int64_t channels) {
    const Map map = map_without_gaps(x.height, x.width, channels, next);
    next += images * map.image;
    return map;
  };
  const Map xz = new_map(2 * inner), x_scan = new_map(inner), projection = new_map(width), y_scan = new_map(inner);
  const Map base = new_map(global), joined = new_map(x.channels);
  const Map x_global = slice(x, 0, global), x_in = slice(xz, 0, inner), z = slice(xz, inner, inner);

  pointwise_into(x_global, images, p[kInWeight], p[kInBias], {}, kNone, xz);
  run(depthwise_of(x_in, x_scan, p[kConvWeight], p[kConvBias], 1, conv_side / 2, kSilu), images);
  pointwise_into(x_scan, images, p[kXWeight], p[kXBias], {}, kNone, projection);
  Problem scan{};
  scan.batch = images, scan.length = x.height * x.width, scan.channels = inner;
  scan.x = x_scan.data, scan.x_batch = x_scan.image, scan.x_row = x_scan.pixel;
  scan.z = z.data, scan.z_batch = z.image, scan.z_row = z.pixel;
  scan.projection = projection.data, scan.y = y_scan.data;
  gated_scan_into(
      scan, p[kDtWeight], p[kDtBias], p[kALog], p[kDSkip], p[kNormWeight], p[kNormBias], norm_eps, reverse, width);
  pointwise_into(y_scan, images, p[kOutWeight], p[kOutBias], {}, kNone, base);
  wavelet_into(x_global, images, p[kBandWeight], base, kRelu, slice(joined, 0, global));

  if (local) {
    const Map from = slice(x, global, local), to = slice(joined, global, local);
    Depthwise d = depthwise_of(from, to, p[kLocalWeight], p[kLocalBias], 1, side / 2, kRelu);
    scale_and_shift(d, p[kLocalScale], p[kLocalShift]);
    d.last_activation = kRelu;
    run(d, images);
  }
  if (rest)
    relu_into(slice(x, global + local, rest), images, slice(joined, global + local, rest));
  pointwise_into(joined, images, p[kProjWeight], p[kProjBias], {x.data, x.pixel}, kNone, out);
}

namespace {

Tensor mixer(const Tensor& x, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps) {
  const Tensor map = as_rows(x), out = new_like(map);
  mixer_into(rows_of(map), map.size(0), p, split, reverse, norm_eps, rows_of(out));
  return out;
}

Tensor traced_mixer(
    const Tensor& x, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps) {
  return traced_map(x, x.sym_size(1), x.sym_size(2), x.sym_size(3));
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("mixer", mobilemamba::OnOwnThreads<mobilemamba::mixer>::call);
}

TORCH_LIBRARY_IMPL(mobilemamba_kernels, Meta, m) {
  m.impl("mixer", mobilemamba::traced_mixer);
}
