// The steps but for the mixer's (mixer_step.cpp). Put together here, and not in Python, because that takes as long as
// the small layers themselves.
#include "layers/steps.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu/pool.h"

namespace mobilemamba {

using at::Tensor;
using at::TensorList;

Norms::Norms(TensorList running, Doubles momenta, Doubles eps, size_t count)
    : running(running), momenta(momenta), eps(eps) {
  TORCH_CHECK(
      running.size() == 3 * count && momenta.size() == count && eps.size() == count, running.size(),
      " running tensors, ", momenta.size(), " momenta and ", eps.size(), " eps for ", count, " norms");
}

Norm Norms::measure(int64_t i, const Tensor& x, const Tensor& weight, const Tensor& bias) const {
  TORCH_CHECK_VALUE(
      x.numel() != x.size(1), "Expected more than 1 value per channel when training, got input size ", x.sizes());
  const int64_t batches = ++*running[3 * i + 2].mutable_data_ptr<int64_t>();
  const double momentum = momenta[i] < 0 ? 1. / batches : momenta[i];
  return Norm::measure(x, running[3 * i], running[3 * i + 1], momentum, weight, bias, eps[i]);
}

namespace {

Output depthwise_ffn(const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps) {
  const WithoutAutograd guard;
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
  const WithoutAutograd guard;
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
  const WithoutAutograd guard;
  check_count(p, 3, "parameters");
  const Tensor u = product(x, p[0]);
  const Norm norm = Norms(running, momenta, eps, 1).measure(0, u, p[1], p[2]);
  return {norm(u), {u, norm.statistics}};
}

Tensors pointwise_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const WithoutAutograd guard;
  check_count(p, 3, "parameters");
  check_count(saved, 2, "saved tensors");
  const auto du = Norm{saved[1], p[1], p[2]}.backward(grad, saved[0]);
  const auto dx = product_backward(du.x, x, p[0]);
  return {dx.x, dx.weight, du.weight, du.bias};
}

Output expand_and_stride(const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps) {
  const WithoutAutograd guard;
  check_count(p, 6, "parameters");
  const Norms norms(running, momenta, eps, 2);
  const Tensor u0 = product(x, p[0]);
  const Norm norm0 = norms.measure(0, u0, p[1], p[2]);
  const Tensor u1 = convolve(norm0(u0, kRelu), p[3], {}, 2);
  const Norm norm1 = norms.measure(1, u1, p[4], p[5]);
  return {norm1(u1, kRelu), {u0, u1, norm0.statistics, norm1.statistics}};
}

Tensors expand_and_stride_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const WithoutAutograd guard;
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

Output squeeze_excite(const Tensor& x, TensorList p, TensorList, Doubles, Doubles) {
  const WithoutAutograd guard;
  check_count(p, 4, "parameters");
  const Tensor mean = image_means(x), h = product(mean, p[0], p[1], kRelu);
  const Tensor gate = product(h, p[2], p[3]).sigmoid_();
  return {scale_images(x, gate, {}), {mean, h, gate}};
}

Tensors squeeze_excite_backward(const Tensor& grad, const Tensor& x, TensorList saved, TensorList p) {
  const WithoutAutograd guard;
  check_count(p, 4, "parameters");
  check_count(saved, 3, "saved tensors");
  const Tensor &mean = saved[0], &h = saved[1], &gate = saved[2];
  const Tensor dexpand = at::sigmoid_backward(image_products(grad, x), gate);
  const auto dh = product_backward(dexpand, h, p[2]);
  activation_gradient_into(dh.x, h, kRelu, dh.x);
  const auto dmean = product_backward(dh.x, mean, p[0]);
  const Tensor shift = dmean.x.div_(x.size(2) * x.size(3));
  return {scale_images(grad, gate, shift), dmean.weight, channel_sums(dh.x), dh.weight, channel_sums(dexpand)};
}

// The maps before all norms, then their statistics.
Output stem(const Tensor& x, TensorList p, TensorList running, Doubles momenta, Doubles eps) {
  const WithoutAutograd guard;
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
  const WithoutAutograd guard;
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

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("depthwise_ffn_step", mobilemamba::BesidePyTorch<mobilemamba::depthwise_ffn>::call);
  m.impl("depthwise_ffn_step_backward", mobilemamba::BesidePyTorch<mobilemamba::depthwise_ffn_backward>::call);
  m.impl("pointwise_step", mobilemamba::BesidePyTorch<mobilemamba::pointwise>::call);
  m.impl("pointwise_step_backward", mobilemamba::BesidePyTorch<mobilemamba::pointwise_backward>::call);
  m.impl("expand_and_stride_step", mobilemamba::BesidePyTorch<mobilemamba::expand_and_stride>::call);
  m.impl("expand_and_stride_step_backward", mobilemamba::BesidePyTorch<mobilemamba::expand_and_stride_backward>::call);
  m.impl("squeeze_excite_step", mobilemamba::BesidePyTorch<mobilemamba::squeeze_excite>::call);
  m.impl("squeeze_excite_step_backward", mobilemamba::BesidePyTorch<mobilemamba::squeeze_excite_backward>::call);
  m.impl("stem_step", mobilemamba::BesidePyTorch<mobilemamba::stem>::call);
  m.impl("stem_step_backward", mobilemamba::BesidePyTorch<mobilemamba::stem_backward>::call);
}
