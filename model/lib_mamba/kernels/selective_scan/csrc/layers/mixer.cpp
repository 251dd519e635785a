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

void relu_into(const Tensor& x, const Tensor& out) {
  const Tensor map = as_rows(x);
  const Matrix from = matrix_of(map), to = matrix_of(out);
  const int64_t channels = map.size(1);
  share_range(num_rows(map), 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < channels; ++c)
        to.at(row)[c] = std::max(from.at(row)[c], 0.f);
  });
}

Tensor mixer(const Tensor& x, at::TensorList p, at::IntArrayRef split, at::IntArrayRef reverse, double norm_eps) {
  TORCH_CHECK(p.size() == kNumParameters, p.size(), " parameters instead of ", kNumParameters + 0);
  TORCH_CHECK(split.size() == 3, "split must have three parts, got ", split);
  const int64_t global = split[0], local = split[1], rest = split[2], side = p[kLocalWeight].size(0);
  TORCH_CHECK(global + local + rest == x.size(1), "split must add up to ", x.size(1), " channels, got ", split);
  const Tensor map = as_rows(x), joined = new_like(map), x_global = map.narrow(1, 0, global);

  const Tensor xz = packed_pointwise(x_global, p[kInWeight], p[kInBias], {}, kNone);
  const int64_t inner = xz.size(1) / 2, conv_side = p[kConvWeight].size(0);
  const Tensor x_in = xz.narrow(1, 0, inner), z = xz.narrow(1, inner, inner);
  const Tensor x_scan = depthwise(x_in, p[kConvWeight], p[kConvBias], {}, {}, 1, conv_side / 2, kSilu);
  const Tensor projection = packed_pointwise(x_scan, p[kXWeight], p[kXBias], {}, kNone);
  const Tensor y_scan = gated_scan(
      sequence_of(x_scan), sequence_of(z), sequence_of(projection), p[kDtWeight], p[kDtBias], p[kALog], p[kDSkip],
      p[kNormWeight], p[kNormBias], norm_eps, reverse);
  const Tensor base = packed_pointwise(map_like(y_scan, map), p[kOutWeight], p[kOutBias], {}, kNone);
  wavelet_into(x_global, p[kBandWeight], base, kRelu, joined.narrow(1, 0, global));

  if (local)
    depthwise_into(
        map.narrow(1, global, local), p[kLocalWeight], p[kLocalBias], p[kLocalScale], p[kLocalShift], 1, side / 2,
        kRelu, kRelu, joined.narrow(1, global, local));
  if (rest)
    relu_into(map.narrow(1, global + local, rest), joined.narrow(1, global + local, rest));
  return packed_pointwise(joined, p[kProjWeight], p[kProjBias], map, kNone);
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
