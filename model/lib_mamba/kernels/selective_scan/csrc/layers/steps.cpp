// Groups of layers in training, each as one operator forward and one backward (model/mobilemamba/training.py).
//
// A step keeps what its batch norms read, and the backward pass normalises again: less to keep, and less to fetch, than
// what the norms give too. Put together here, and not in Python, because that takes as long as the small layers themselves.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "layers/layers.h"
#include "layers/maps.h"

namespace mobilemamba {
namespace {

using at::Tensor;
using at::TensorList;
using Tensors = std::vector<Tensor>;
using Doubles = at::ArrayRef<double>;

// The output, and what the backward pass needs beside the input and the parameters.
using Output = std::tuple<Tensor, Tensors>;

void check_count(TensorList tensors, size_t count, const char* name) {
  TORCH_CHECK(tensors.size() == count, tensors.size(), " ", name, " instead of ", count);
}

// The batch norms of a step, in the order of its layers.
struct Norms {
  TensorList running;  // mean, variance and number of batches of each
  Doubles momenta;     // negative: the mean of all batches
  Doubles eps;

  Norms(TensorList running_, Doubles momenta_, Doubles eps_, size_t count)
      : running(running_), momenta(momenta_), eps(eps_) {
    TORCH_CHECK(
        running.size() == 3 * count && momenta.size() == count && eps.size() == count, running.size(),
        " running tensors, ", momenta.size(), " momenta and ", eps.size(), " eps for ", count, " norms");
  }

  // The norm number `i`, measured on a map.
  Norm measure(int64_t i, const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    TORCH_CHECK_VALUE(
        x.numel() != x.size(1), "Expected more than 1 value per channel when training, got input size ", x.sizes());
    const int64_t batches = ++*running[3 * i + 2].mutable_data_ptr<int64_t>();
    const double momentum = momenta[i] < 0 ? 1. / batches : momenta[i];
    return Norm::measure(x, running[3 * i], running[3 * i + 1], momentum, weight, bias, eps[i]);
  }
};

Output depthwise_ffn(const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 9, "parameters");
  const Norms norms(running, momenta, eps, 3);
  const Tensor u0 = convolve(x, p[0]);
  const Norm norm0 = norms.measure(0, u0, p[1], p[2]);
  const Tensor y = norm0(u0, kNone, x), u1 = product(y, p[3]);
  const Norm norm1 = norms.measure(1, u1, p[4], p[5]);
  const Tensor u2 = product(norm1(u1, kRelu), p[6]);
  const Norm norm2 = norms.measure(2, u2, p[7], p[8]);
  return {norm2(u2, kNone, y), {u0, u1, u2, norm0.statistics, norm1.statistics, norm2.statistics}};
}

Tensors depthwise_ffn_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 9, "parameters");
  check_count(saved, 6, "saved tensors");
  const Tensor &u0 = saved[0], &u1 = saved[1], &u2 = saved[2];
  const Norm norm0{saved[3], p[1], p[2]}, norm1{saved[4], p[4], p[5]}, norm2{saved[5], p[7], p[8]};
  const auto du2 = norm2.backward(grad, u2);
  const auto dh = product_backward(du2.x, norm1(u1, kRelu), p[6]);
  const auto du1 = norm1.backward(dh.x, u1, kRelu, dh.x);
  const auto dy = product_backward(du1.x, norm0(u0, kNone, x), p[3], grad);
  const auto du0 = norm0.backward(dy.x, u0, kNone, du2.x);
  const auto dx = convolve_backward(du0.x, x, p[0], 1, dy.x);
  return {dx.x, dx.weight, du0.weight, du0.bias, dy.weight, du1.weight, du1.bias, dh.weight, du2.weight, du2.bias};
}

Output pointwise(const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 3, "parameters");
  const Tensor u = product(x, p[0]);
  const Norm norm = Norms(running, momenta, eps, 1).measure(0, u, p[1], p[2]);
  return {norm(u), {u, norm.statistics}};
}

Tensors pointwise_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 3, "parameters");
  check_count(saved, 2, "saved tensors");
  const auto du = Norm{saved[1], p[1], p[2]}.backward(grad, saved[0]);
  const auto dx = product_backward(du.x, x, p[0]);
  return {dx.x, dx.weight, du.weight, du.bias};
}

Output expand_and_stride(const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 6, "parameters");
  const Norms norms(running, momenta, eps, 2);
  const Tensor u0 = product(x, p[0]);
  const Norm norm0 = norms.measure(0, u0, p[1], p[2]);
  const Tensor u1 = convolve(norm0(u0, kRelu), p[3], {}, 2);
  const Norm norm1 = norms.measure(1, u1, p[4], p[5]);
  return {norm1(u1, kRelu), {u0, u1, norm0.statistics, norm1.statistics}};
}

Tensors expand_and_stride_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 6, "parameters");
  check_count(saved, 4, "saved tensors");
  const Tensor &u0 = saved[0], &u1 = saved[1];
  const Norm norm0{saved[2], p[1], p[2]}, norm1{saved[3], p[4], p[5]};
  const auto du1 = norm1.backward(grad, u1, kRelu);
  const auto dh = convolve_backward(du1.x, norm0(u0, kRelu), p[3], 2);
  const auto du0 = norm0.backward(dh.x, u0, kRelu, dh.x);
  const auto dx = product_backward(du0.x, x, p[0]);
  return {dx.x, dx.weight, du0.weight, du0.bias, dh.weight, du1.weight, du1.bias};
}

Tensor as_factor(const Tensor& weight) {
  return weight.unsqueeze(-1).unsqueeze(-1);
}

// On one pixel an image, a 1 x 1 convolution is a product.
Output squeeze_excite(const Tensor& x, TensorList p, TensorList, Doubles, Doubles) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 4, "parameters");
  const Tensor mean = x.mean({2, 3}), h = at::addmm(p[1], mean, p[0].flatten(1).t()).relu_();
  const Tensor gate = at::addmm(p[3], h, p[2].flatten(1).t()).sigmoid_();
  return {x * as_factor(gate), {mean, h, gate}};
}

Tensors squeeze_excite_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(p, 4, "parameters");
  check_count(saved, 3, "saved tensors");
  const Tensor &mean = saved[0], &h = saved[1], &gate = saved[2];
  const Tensor dexpand = at::sigmoid_backward((grad * x).sum({2, 3}), gate);
  const Tensor dreduce = at::threshold_backward(dexpand.mm(p[2].flatten(1)), h, 0);
  const Tensor dmean = dreduce.mm(p[0].flatten(1)).div_(x.size(2) * x.size(3));
  return {
      at::addcmul(as_factor(dmean), grad, as_factor(gate)),
      dreduce.t().mm(mean).view_as(p[0]),
      dreduce.sum(0),
      dexpand.t().mm(h).view_as(p[2]),
      dexpand.sum(0),
  };
}

// The maps before all norms, then their statistics.
Output stem(const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Norms norms(running, momenta, eps, eps.size());
  const size_t count = eps.size();
  check_count(p, 3 * count, "parameters");
  Tensors saved{at::conv2d(x, p[0], {}, 2, 1)}, statistics;
  for (size_t i = 0;; ++i) {
    const Norm norm = norms.measure(i, saved[i], p[3 * i + 1], p[3 * i + 2]);
    statistics.push_back(norm.statistics);
    if (i + 1 == count) {
      const Tensor out = norm(saved[i]);
      saved.insert(saved.end(), statistics.begin(), statistics.end());
      return {out, saved};
    }
    saved.push_back(strided_conv(saved[i], norm, p[3 * i + 3]));
  }
}

Tensors stem_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const size_t count = p.size() / 3;
  check_count(saved, 2 * count, "saved tensors");
  const auto norm = [&](size_t i) { return Norm{saved[count + i], p[3 * i + 1], p[3 * i + 2]}; };
  Tensors gradients(1 + 3 * count);
  auto du = norm(count - 1).backward(grad, saved[count - 1]);
  for (size_t i = count - 1;; --i) {
    gradients[3 * i + 2] = du.weight, gradients[3 * i + 3] = du.bias;
    if (i == 0)
      break;
    const auto dh = strided_conv_backward(du.x, saved[i - 1], norm(i - 1), p[3 * i]);
    gradients[3 * i + 1] = dh.weight;
    du = norm(i - 1).backward(dh.x, saved[i - 1], kRelu, dh.x);
  }
  std::tie(gradients[0], gradients[1], std::ignore) = at::convolution_backward(
      du.x, x, p[0], std::nullopt, {2, 2}, {1, 1}, {1, 1}, false, {0, 0}, 1, {x.requires_grad(), true, false});
  return gradients;
}

// Pixels as rows (B * H * W, C), as a sequence (B, H * W, C), and back: views where channels lie side by side.
Tensor rows_of(const Tensor& map) {
  return map.permute({0, 2, 3, 1}).flatten(0, 2);
}

Tensor sequence_of(const Tensor& map) {
  return map.permute({0, 2, 3, 1}).flatten(1, 2);
}

Tensor map_like(const Tensor& sequence, const Tensor& map) {
  return sequence.reshape({map.size(0), map.size(2), map.size(3), -1}).permute({0, 3, 1, 2});
}

// The weight of the bands (4C, 1, side, side) times their scale, as kernels read it: (side, side, 4C), band by band. The
// transpose of the branch has its places in the opposite order.
Tensor scaled_bands(const Tensor& weight, const Tensor& scale, bool is_transposed) {
  const int64_t side = weight.size(2), places = side * side, channels = weight.size(0) / 4;
  const Tensor taps = at::empty({side, side, 4 * channels}, weight.options());
  const Tensor from = weight.contiguous(), factors = scale.contiguous();
  const float *w = from.const_data_ptr<float>(), *s = factors.const_data_ptr<float>();
  float* out = taps.mutable_data_ptr<float>();
  for (int64_t place = 0; place < places; ++place, out += 4 * channels)
    for (int64_t row = 0; row < 4 * channels; ++row)
      out[row % 4 * channels + row / 4] = w[row * places + (is_transposed ? places - 1 - place : place)] * s[row];
  return taps;
}

// Gradients of the two from that of the first.
std::tuple<Tensor, Tensor> scaled_bands_backward(const Tensor& dtaps, const Tensor& weight, const Tensor& scale) {
  const int64_t places = weight.size(2) * weight.size(3), channels = weight.size(0) / 4;
  const Tensor dweight = at::empty(weight.sizes(), weight.options()), dscale = at::empty(scale.sizes(), scale.options());
  const Tensor from = weight.contiguous(), factors = scale.contiguous();
  const float *w = from.const_data_ptr<float>(), *s = factors.const_data_ptr<float>();
  const float* taps = dtaps.const_data_ptr<float>();
  float *dw = dweight.mutable_data_ptr<float>(), *ds = dscale.mutable_data_ptr<float>();
  for (int64_t row = 0; row < 4 * channels; ++row) {
    double sum = 0;
    for (int64_t place = 0; place < places; ++place) {
      const float d = taps[place * 4 * channels + row % 4 * channels + row / 4];
      dw[row * places + place] = d * s[row];
      sum += static_cast<double>(d) * w[row * places + place];
    }
    ds[row] = static_cast<float>(sum);
  }
  return {dweight, dscale};
}

// What a mixer learns, in the order of training.py.
struct MixerParameters {
  const Tensor &in_weight, &in_scale, &in_shift, &conv_weight, &conv_bias, &x_weight, &dt_weight, &dt_bias, &A_log,
      &D_skip, &norm_weight, &norm_bias, &out_weight, &out_scale, &out_shift, &base_scale, &band_weight, &band_scale,
      &local_weight, &local_scale, &local_shift, &factor, &factor_scale, &factor_shift, &proj_weight, &proj_scale,
      &proj_shift;

  explicit MixerParameters(TensorList p)
      : in_weight(p[0]), in_scale(p[1]), in_shift(p[2]), conv_weight(p[3]), conv_bias(p[4]), x_weight(p[5]),
        dt_weight(p[6]), dt_bias(p[7]), A_log(p[8]), D_skip(p[9]), norm_weight(p[10]), norm_bias(p[11]),
        out_weight(p[12]), out_scale(p[13]), out_shift(p[14]), base_scale(p[15]), band_weight(p[16]), band_scale(p[17]),
        local_weight(p[18]), local_scale(p[19]), local_shift(p[20]), factor(p[21]), factor_scale(p[22]),
        factor_shift(p[23]), proj_weight(p[24]), proj_scale(p[25]), proj_shift(p[26]) {}

  // (K * (R + 2N), D)
  Tensor projection() const { return x_weight.flatten(0, 1); }
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
    const Tensor& x, TensorList parameters, TensorList running, Doubles momenta, Doubles eps, at::IntArrayRef sizes,
    at::IntArrayRef reverse, double norm_eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(parameters, 27, "parameters");
  const Norms norms(running, momenta, eps, 5);
  const MixerParameters p(parameters);
  const Split split(sizes);
  const Tensor x_global = split.of_global(x), x_local = split.of_local(x), y = new_like(x);

  const Tensor u_in = product(x_global, p.in_weight);
  const Norm in_norm = norms.measure(0, u_in, p.in_scale, p.in_shift);
  const Tensors h_in = in_norm(u_in).chunk(2, 1);
  const Tensor &x_in = h_in[0], &z = h_in[1];
  const Tensor x_scan = convolve(x_in, p.conv_weight, p.conv_bias, 1, kSilu);
  const Tensor projection = at::mm(rows_of(x_scan), p.projection().t());
  const Tensor y_scan = map_like(
      gated_scan(
          sequence_of(x_scan), sequence_of(z), projection, p.dt_weight, p.dt_bias, p.A_log, p.D_skip, p.norm_weight,
          p.norm_bias, norm_eps, reverse),
      x);
  const Tensor u_out = product(y_scan, p.out_weight), base = p.base_scale.flatten();
  const Norm out_norm = norms.measure(1, u_out, p.out_scale * base, p.out_shift * base);
  const Tensor bands = scaled_bands(p.band_weight, p.band_scale, false);
  Tensor y_global = split.of_global(y), y_local = split.of_local(y), y_rest = split.of_rest(y);
  at::clamp_min_out(y_global, wavelet(x_global, bands, out_norm(u_out)), 0);

  const Tensor u_local = convolve(x_local, p.local_weight);
  const Norm local_norm = norms.measure(2, u_local, p.local_scale, p.local_shift);
  const Tensor h_local = local_norm(u_local, kRelu).mul_(as_factor(p.factor.flatten()));
  const Norm factor_norm = norms.measure(3, h_local, p.factor_scale, p.factor_shift);
  factor_norm.write(h_local, kRelu, {}, y_local);
  at::clamp_min_out(y_rest, split.of_rest(x), 0);

  const Tensor u_proj = product(y, p.proj_weight);
  const Norm proj_norm = norms.measure(4, u_proj, p.proj_scale, p.proj_shift);
  return {
      proj_norm(u_proj, kNone, x),
      {u_in, projection, y_scan, u_out, u_local, y, u_proj, in_norm.statistics, out_norm.statistics,
       local_norm.statistics, factor_norm.statistics, proj_norm.statistics}};
}

Tensors mixer_backward(
    const Tensor& grad, const Tensor& x, TensorList saved, TensorList parameters, at::IntArrayRef sizes,
    at::IntArrayRef reverse, double norm_eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_count(parameters, 27, "parameters");
  check_count(saved, 12, "saved tensors");
  const MixerParameters p(parameters);
  const Split split(sizes);
  const Tensor &u_in = saved[0], &projection = saved[1], &y_scan = saved[2], &u_out = saved[3], &u_local = saved[4];
  const Tensor &y = saved[5], &u_proj = saved[6], base = p.base_scale.flatten();
  const Norm in_norm{saved[7], p.in_scale, p.in_shift};
  const Norm out_norm{saved[8], p.out_scale * base, p.out_shift * base};
  const Norm local_norm{saved[9], p.local_scale, p.local_shift};
  const Norm factor_norm{saved[10], p.factor_scale, p.factor_shift};
  const Norm proj_norm{saved[11], p.proj_scale, p.proj_shift};
  const Tensor x_global = split.of_global(x), x_local = split.of_local(x), dx = new_like(x);

  const auto du_proj = proj_norm.backward(grad, u_proj);
  const auto dproj = product_backward(du_proj.x, y, p.proj_weight);
  Tensor dy = dproj.x;
  at::threshold_backward_out(dy, dy, y, 0);
  const Tensor dy_global = split.of_global(dy);

  const Tensor factor = as_factor(p.factor.flatten()), h_local = local_norm(u_local, kRelu);
  const auto dfactor_norm = factor_norm.backward(split.of_local(dy), h_local * factor);
  const Tensor dfactor = (dfactor_norm.x * h_local).sum({0, 2, 3}).view_as(p.factor);
  const auto du_local = local_norm.backward(dfactor_norm.x.mul_(factor), u_local, kRelu, dfactor_norm.x);
  const auto dlocal = convolve_backward(du_local.x, x_local, p.local_weight);

  // The norm's weight and bias hold base_scale.
  const auto du_out = out_norm.backward(dy_global, u_out);
  const Tensor dbase = (du_out.weight * p.out_scale + du_out.bias * p.out_shift).view_as(p.base_scale);
  const auto dout = product_backward(du_out.x, y_scan, p.out_weight);

  const Tensors h_in = in_norm(u_in).chunk(2, 1);
  const Tensor &x_in = h_in[0], &z = h_in[1];
  const Tensor x_conv = convolve(x_in, p.conv_weight, p.conv_bias), x_scan = at::silu(x_conv);
  const auto [dx_scan, dz, dprojection, ddt_weight, ddt_bias, dA_log, dD_skip, dnorm_weight, dnorm_bias] =
      gated_scan_backward(
          sequence_of(dout.x), sequence_of(x_scan), sequence_of(z), projection, p.dt_weight, p.dt_bias, p.A_log,
          p.D_skip, p.norm_weight, p.norm_bias, norm_eps, reverse);
  const Tensor dx_weight = at::mm(dprojection.t(), rows_of(x_scan)).view_as(p.x_weight);
  const Tensor dx_conv = map_like(dx_scan.flatten(0, 1).addmm_(dprojection, p.projection()), x);
  const Tensor dconv = at::silu_backward(dx_conv, x_conv);
  const auto din = convolve_backward(dconv, x_in, p.conv_weight);
  const Tensor du_in = new_like(u_in);
  const int64_t inner = u_in.size(1) / 2;
  const auto du_x = in_norm.slice(0, inner)
                        .backward(din.x, u_in.narrow(1, 0, inner), kNone, du_in.narrow(1, 0, inner));
  const auto du_z = in_norm.slice(inner, inner)
                        .backward(map_like(dz, x), u_in.narrow(1, inner, inner), kNone, du_in.narrow(1, inner, inner));
  const auto dglobal = product_backward(du_in, x_global, p.in_weight);

  const Tensor bands = scaled_bands(p.band_weight, p.band_scale, true);
  const Tensor dtaps = wavelet_taps(dy_global, x_global, p.band_weight.size(2));
  const auto [dband_weight, dband_scale] = scaled_bands_backward(dtaps, p.band_weight, p.band_scale);

  Tensor dx_global = split.of_global(dx), dx_local = split.of_local(dx), dx_rest = split.of_rest(dx);
  at::add_out(dx_global, wavelet(dy_global, bands, dglobal.x), split.of_global(grad));
  at::add_out(dx_local, dlocal.x, split.of_local(grad));
  at::add_out(dx_rest, split.of_rest(dy), split.of_rest(grad));
  return {
      dx,
      dglobal.weight,
      at::cat({du_x.weight, du_z.weight}),
      at::cat({du_x.bias, du_z.bias}),
      din.weight,
      rows_of(dconv).sum(0),
      dx_weight,
      ddt_weight,
      ddt_bias,
      dA_log,
      dD_skip,
      dnorm_weight,
      dnorm_bias,
      dout.weight,
      du_out.weight * base,
      du_out.bias * base,
      dbase,
      dband_weight,
      dband_scale,
      dlocal.weight,
      du_local.weight,
      du_local.bias,
      dfactor,
      dfactor_norm.weight,
      dfactor_norm.bias,
      dproj.weight,
      du_proj.weight,
      du_proj.bias,
  };
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("depthwise_ffn_step", mobilemamba::depthwise_ffn);
  m.impl("depthwise_ffn_step_backward", mobilemamba::depthwise_ffn_backward);
  m.impl("pointwise_step", mobilemamba::pointwise);
  m.impl("pointwise_step_backward", mobilemamba::pointwise_backward);
  m.impl("expand_and_stride_step", mobilemamba::expand_and_stride);
  m.impl("expand_and_stride_step_backward", mobilemamba::expand_and_stride_backward);
  m.impl("squeeze_excite_step", mobilemamba::squeeze_excite);
  m.impl("squeeze_excite_step_backward", mobilemamba::squeeze_excite_backward);
  m.impl("stem_step", mobilemamba::stem);
  m.impl("stem_step_backward", mobilemamba::stem_backward);
  m.impl("mixer_step", mobilemamba::mixer);
  m.impl("mixer_step_backward", mobilemamba::mixer_backward);
}
