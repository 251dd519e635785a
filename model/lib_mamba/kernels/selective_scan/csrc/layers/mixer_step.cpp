// The step of a residual mixer: SS2D and the wavelet branch on some channels, MK-DeConv on others, the rest as they
// are; a ReLU, a projection of all.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/pool.h"
#include "layers/maps.h"
#include "layers/steps.h"
#include "layers/weights.h"
#include "scan/scan.h"

namespace mobilemamba {
namespace {

using at::Tensor;
using at::TensorList;

// The packed weight of the bands times their scale. The transpose of the branch has its places in the opposite order.
Tensor scaled_bands(const Tensor& weight, const Tensor& scale, bool is_transposed) {
  const Tensor scaled = weight * scale.reshape({-1, 1, 1, 1});
  return pack_bands(is_transposed ? scaled.flip({2, 3}) : scaled);
}

// Gradients of weight and scale from the packed one of their product.
std::tuple<Tensor, Tensor> scaled_bands_backward(const Tensor& packed, const Tensor& weight, const Tensor& scale) {
  const Tensor gradient = unpack_bands(packed), dscale = at::empty(scale.sizes(), scale.options());
  const Tensor own_weight = weight.contiguous();
  const float *d = gradient.const_data_ptr<float>(), *w = own_weight.const_data_ptr<float>();
  float* ds = dscale.mutable_data_ptr<float>();
  const int64_t places = weight.size(2) * weight.size(3);
  for (int64_t row = 0; row < weight.size(0); ++row, d += places, w += places) {
    double sum = 0;
    for (int64_t place = 0; place < places; ++place)
      sum += static_cast<double>(d[place]) * w[place];
    ds[row] = static_cast<float>(sum);
  }
  return {gradient * scale.reshape({-1, 1, 1, 1}), dscale};
}

// A mixer's parameters, and their gradients, in the order in which the step takes and returns them.
enum Parameter {
  // SS2D. A norm's weight and bias are called scale and shift.
  kInWeight,    // (2D, C, 1, 1)
  kInScale,     // (2D)
  kInShift,     // (2D)
  kConvWeight,  // (D, 1, side, side)
  kConvBias,    // (D)
  kXWeight,     // (K, R + 2N, D)
  kDtWeight,    // (K, D, R)
  kDtBias,      // (K, D)
  kALog,        // (K * D, N)
  kDSkip,       // (K * D)
  kNormWeight,  // (D), of the layer norm
  kNormBias,    // (D)
  kOutWeight,   // (C, D, 1, 1)
  kOutScale,    // (C)
  kOutShift,    // (C)
  // Wavelet branch.
  kBaseScale,   // (1, C, 1, 1)
  kBandWeight,  // (4C, 1, side, side)
  kBandScale,   // (1, 4C, 1, 1)
  // MK-DeConv: a depthwise convolution, and a 1 x 1 one that multiplies every channel by a factor.
  kLocalWeight,  // (C', 1, side, side)
  kLocalScale,   // (C')
  kLocalShift,   // (C')
  kFactor,       // (C', 1, 1, 1)
  kFactorScale,  // (C')
  kFactorShift,  // (C')
  // The projection of all channels.
  kProjWeight,  // (C'', C'', 1, 1)
  kProjScale,   // (C'')
  kProjShift,   // (C'')
  kNumParameters,
};

// The tensors that a mixer's backward pass needs.
enum Saved {
  kUIn,  // maps before the batch norms
  kUOut,
  kULocal,
  kUProj,
  kProjection,  // of the scan
  kYScan,
  kY,  // the input of the last projection
  kInStatistics,
  kOutStatistics,
  kLocalStatistics,
  kFactorStatistics,
  kProjStatistics,
  kNumSaved,
};

// The channels of the global branch, of the local one, and those that pass.
struct Split {
  int64_t global, local, rest;

  explicit Split(at::IntArrayRef sizes) : global(sizes[0]), local(sizes[1]), rest(sizes[2]) {}

  Tensor of_global(const Tensor& x) const { return x.narrow(1, 0, global); }
  Tensor of_local(const Tensor& x) const { return x.narrow(1, global, local); }
  Tensor of_rest(const Tensor& x) const { return x.narrow(1, global + local, rest); }
};

Output mixer(
    const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps, at::IntArrayRef sizes,
    at::IntArrayRef reverse, double norm_eps) {
  const WithoutAutograd guard;
  check_count(p, kNumParameters, "parameters");
  const Norms norms(running, momenta, eps, 5);
  const Split split(sizes);
  const Tensor x_global = split.of_global(x), x_local = split.of_local(x), y = new_like(x);

  const Tensor u_in = product(x_global, p[kInWeight]);
  const Norm in_norm = norms.measure(0, u_in, p[kInScale], p[kInShift]);
  const Tensors h_in = in_norm(u_in).chunk(2, 1);
  const Tensor &x_in = h_in[0], &z = h_in[1];
  const Tensor x_scan = convolve(x_in, p[kConvWeight], p[kConvBias], 1, kSilu);
  const Tensor projection = product(x_scan, p[kXWeight].flatten(0, 1));
  const Tensor y_sequence = gated_scan(
      sequence_of(x_scan), sequence_of(z), sequence_of(projection), p[kDtWeight], p[kDtBias], p[kALog], p[kDSkip],
      p[kNormWeight], p[kNormBias], norm_eps, reverse);
  const Tensor y_scan = map_like(y_sequence, x);
  const Tensor u_out = product(y_scan, p[kOutWeight]), base = p[kBaseScale].flatten();
  const Norm out_norm = norms.measure(1, u_out, p[kOutScale] * base, p[kOutShift] * base);
  const Tensor bands = scaled_bands(p[kBandWeight], p[kBandScale], false);
  const Tensor below = out_norm(u_out), y_global = split.of_global(y);
  wavelet_into(map_of(x_global), x.size(0), bands, map_of(below), kRelu, map_of(y_global));

  const Tensor u_local = convolve(x_local, p[kLocalWeight]);
  const Norm local_norm = norms.measure(2, u_local, p[kLocalScale], p[kLocalShift]);
  const Tensor h_local = local_norm(u_local, kRelu);
  scale_into(h_local, p[kFactor].flatten(), kNone, {}, h_local);
  const Norm factor_norm = norms.measure(3, h_local, p[kFactorScale], p[kFactorShift]);
  factor_norm.write(h_local, kRelu, {}, split.of_local(y));
  scale_into(split.of_rest(x), {}, kRelu, {}, split.of_rest(y));

  const Tensor u_proj = product(y, p[kProjWeight]);
  const Norm proj_norm = norms.measure(4, u_proj, p[kProjScale], p[kProjShift]);
  Tensors saved(kNumSaved);
  saved[kUIn] = u_in;
  saved[kUOut] = u_out;
  saved[kULocal] = u_local;
  saved[kUProj] = u_proj;
  saved[kProjection] = projection;
  saved[kYScan] = y_scan;
  saved[kY] = y;
  saved[kInStatistics] = in_norm.statistics;
  saved[kOutStatistics] = out_norm.statistics;
  saved[kLocalStatistics] = local_norm.statistics;
  saved[kFactorStatistics] = factor_norm.statistics;
  saved[kProjStatistics] = proj_norm.statistics;
  return {proj_norm(u_proj, kNone, x), saved};
}

Tensors mixer_backward(
    const Tensor& grad, const Tensor& x, TensorList saved, TensorList p, at::IntArrayRef sizes, at::IntArrayRef reverse,
    double norm_eps) {
  const WithoutAutograd guard;
  check_count(p, kNumParameters, "parameters");
  check_count(saved, kNumSaved, "saved tensors");
  const Split split(sizes);
  const Tensor &u_in = saved[kUIn], &u_out = saved[kUOut], &u_local = saved[kULocal], &u_proj = saved[kUProj];
  const Tensor &projection = saved[kProjection], &y_scan = saved[kYScan], &y = saved[kY];
  const Tensor base = p[kBaseScale].flatten();
  const Norm in_norm{saved[kInStatistics], p[kInScale], p[kInShift]};
  const Norm out_norm{saved[kOutStatistics], p[kOutScale] * base, p[kOutShift] * base};
  const Norm local_norm{saved[kLocalStatistics], p[kLocalScale], p[kLocalShift]};
  const Norm factor_norm{saved[kFactorStatistics], p[kFactorScale], p[kFactorShift]};
  const Norm proj_norm{saved[kProjStatistics], p[kProjScale], p[kProjShift]};
  const Tensor x_global = split.of_global(x), x_local = split.of_local(x), dx = new_like(x);

  const auto du_proj = proj_norm.backward(grad, u_proj);
  const auto dproj = product_backward(du_proj.x, y, p[kProjWeight]);
  const Tensor& dy = dproj.x;
  activation_gradient_into(dy, y, kRelu, dy);
  const Tensor dy_global = split.of_global(dy);

  const Tensor factor = p[kFactor].flatten(), h_local = local_norm(u_local, kRelu), scaled = new_like(h_local);
  scale_into(h_local, factor, kNone, {}, scaled);
  const auto dscaled = factor_norm.backward(split.of_local(dy), scaled, kNone, scaled);
  const Tensor dfactor = channel_products(dscaled.x, h_local).view_as(p[kFactor]);
  scale_into(dscaled.x, factor, kNone, {}, dscaled.x);
  const auto du_local = local_norm.backward(dscaled.x, u_local, kRelu, dscaled.x);
  const auto dlocal =
      convolve_backward(du_local.x, x_local, p[kLocalWeight], 1, split.of_local(grad), split.of_local(dx));

  // The norm's weight and bias hold base_scale.
  const auto du_out = out_norm.backward(dy_global, u_out);
  const Tensor dbase = (du_out.weight * p[kOutScale] + du_out.bias * p[kOutShift]).view_as(p[kBaseScale]);
  const auto dout = product_backward(du_out.x, y_scan, p[kOutWeight]);

  const Tensors h_in = in_norm(u_in).chunk(2, 1);
  const Tensor &x_in = h_in[0], &z = h_in[1];
  const Tensor x_conv = convolve(x_in, p[kConvWeight], p[kConvBias]), x_scan = new_like(x_conv);
  scale_into(x_conv, {}, kSilu, {}, x_scan);
  const auto [dx_scan, dz, dprojection, ddt_weight, ddt_bias, dA_log, dD_skip, dnorm_weight, dnorm_bias] =
      gated_scan_backward(
          sequence_of(dout.x), sequence_of(x_scan), sequence_of(z), sequence_of(projection), p[kDtWeight], p[kDtBias],
          p[kALog], p[kDSkip], p[kNormWeight], p[kNormBias], norm_eps, reverse, std::nullopt, std::nullopt);
  const auto dx_projected =
      product_backward(map_like(dprojection, x), x_scan, p[kXWeight].flatten(0, 1), map_like(dx_scan, x));
  const Tensor& dconv = dx_projected.x;
  activation_gradient_into(dconv, x_conv, kSilu, dconv);
  const auto din = convolve_backward(dconv, x_in, p[kConvWeight]);
  const Tensor du_in = new_like(u_in);
  const int64_t inner = u_in.size(1) / 2;
  const auto du_x = in_norm.slice(0, inner).backward(din.x, u_in.narrow(1, 0, inner), kNone, du_in.narrow(1, 0, inner));
  const auto du_z = in_norm.slice(inner, inner)
                        .backward(map_like(dz, x), u_in.narrow(1, inner, inner), kNone, du_in.narrow(1, inner, inner));
  const auto dglobal = product_backward(du_in, x_global, p[kInWeight], split.of_global(grad));

  const Tensor bands = scaled_bands(p[kBandWeight], p[kBandScale], true);
  const Tensor dbands = wavelet_weight_gradient(dy_global, x_global, p[kBandWeight].size(2));
  const auto [dband_weight, dband_scale] = scaled_bands_backward(dbands, p[kBandWeight], p[kBandScale]);

  const Tensor dx_global = split.of_global(dx);
  wavelet_into(map_of(dy_global), x.size(0), bands, map_of(dglobal.x), kNone, map_of(dx_global));
  scale_into(split.of_rest(dy), {}, kNone, split.of_rest(grad), split.of_rest(dx));
  Tensors gradients(1 + kNumParameters);
  gradients[0] = dx;
  const auto gradient_of = [&](Parameter parameter) -> Tensor& { return gradients[1 + parameter]; };
  gradient_of(kInWeight) = dglobal.weight;
  gradient_of(kInScale) = at::cat({du_x.weight, du_z.weight});
  gradient_of(kInShift) = at::cat({du_x.bias, du_z.bias});
  gradient_of(kConvWeight) = din.weight;
  gradient_of(kConvBias) = channel_sums(dconv);
  gradient_of(kXWeight) = dx_projected.weight.view_as(p[kXWeight]);
  gradient_of(kDtWeight) = ddt_weight;
  gradient_of(kDtBias) = ddt_bias;
  gradient_of(kALog) = dA_log;
  gradient_of(kDSkip) = dD_skip;
  gradient_of(kNormWeight) = dnorm_weight;
  gradient_of(kNormBias) = dnorm_bias;
  gradient_of(kOutWeight) = dout.weight;
  gradient_of(kOutScale) = du_out.weight * base;
  gradient_of(kOutShift) = du_out.bias * base;
  gradient_of(kBaseScale) = dbase;
  gradient_of(kBandWeight) = dband_weight;
  gradient_of(kBandScale) = dband_scale;
  gradient_of(kLocalWeight) = dlocal.weight;
  gradient_of(kLocalScale) = du_local.weight;
  gradient_of(kLocalShift) = du_local.bias;
  gradient_of(kFactor) = dfactor;
  gradient_of(kFactorScale) = dscaled.weight;
  gradient_of(kFactorShift) = dscaled.bias;
  gradient_of(kProjWeight) = dproj.weight;
  gradient_of(kProjScale) = du_proj.weight;
  gradient_of(kProjShift) = du_proj.bias;
  return gradients;
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("mixer_step", mobilemamba::BesidePyTorch<mobilemamba::mixer>::call);
  m.impl("mixer_step_backward", mobilemamba::BesidePyTorch<mobilemamba::mixer_backward>::call);
}
