// Layers and their gradients, on channels-last maps in float32: the steps of training are made of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/kernels.h"

namespace mobilemamba {

// Gradients of a layer's input and of its weight.
struct Gradients {
  at::Tensor x, weight;
};

// A batch norm on one batch.
struct Norm {
  at::Tensor statistics;    // (2, C): means, and factors of the distances from them, 1 / sqrt(var + eps)
  at::Tensor weight, bias;  // (C)

  struct Gradients {
    at::Tensor x, weight, bias;
  };

  // Measure a map. The running statistics move towards its means and unbiased variances.
  static Norm measure(
      const at::Tensor& x, const at::Tensor& running_mean, const at::Tensor& running_var, double momentum,
      const at::Tensor& weight, const at::Tensor& bias, double eps);

  // act(norm(x)) + residual
  at::Tensor operator()(const at::Tensor& x, Activation activation = kNone, const at::Tensor& residual = {}) const;
  void write(const at::Tensor& x, Activation activation, const at::Tensor& residual, const at::Tensor& out) const;

  // The gradient of x is written to `out`, which may be `grad`, or where there is none to a new map.
  Gradients backward(
      const at::Tensor& grad, const at::Tensor& x, Activation activation = kNone, const at::Tensor& out = {}) const;

  // The norm of some of the channels.
  Norm slice(int64_t first, int64_t count) const {
    return {statistics.narrow(1, first, count), weight.narrow(0, first, count), bias.narrow(0, first, count)};
  }

  void check(int64_t channels) const;

  // Fills `scale`, which has as many floats as there are channels.
  Normalization normalization(float* scale, Activation activation) const;
};

// Products with a weight (C', C, 1, 1). Gradients of x are added to `base`, where there is one.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight);
Gradients product_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& base = {});

// A depthwise convolution with a weight (C, 1, side, side), padded by half a side.
at::Tensor convolve(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {}, int64_t stride = 1,
    Activation activation = kNone);
Gradients convolve_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, int64_t stride = 1,
    const at::Tensor& base = {});

// A convolution (C', C, 3, 3) of stride 2 of relu(norm(x)), and gradients of that.
at::Tensor strided_conv(const at::Tensor& x, const Norm& norm, const at::Tensor& weight);
Gradients strided_conv_backward(
    const at::Tensor& grad, const at::Tensor& x, const Norm& norm, const at::Tensor& weight);

// The wavelet branch, plus base, by its packed weight (side, side, 4C), to a new map, or activated to `out`; the
// gradient of that weight.
at::Tensor wavelet(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& base);
void wavelet_into(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& base, int64_t activation, const at::Tensor& out);
at::Tensor wavelet_weight_gradient(const at::Tensor& grad, const at::Tensor& x, int64_t side);

// A depthwise convolution by its packed weight (side, side, C): act(conv + bias), then times scale, plus shift; to a
// new map, or with a last activation to `out`.
Depthwise depthwise_of(
    const at::Tensor& map, const at::Tensor& out, const at::Tensor& weight, const at::Tensor& bias, int64_t stride,
    int64_t padding, int64_t activation);
at::Tensor depthwise(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, int64_t stride, int64_t padding, int64_t activation);
void depthwise_into(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, int64_t stride, int64_t padding, int64_t activation,
    int64_t last_activation, const at::Tensor& out);

// act(x W + b) + residual, for every pixel, by the packed W (layers/weights.h).
at::Tensor packed_pointwise(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& residual,
    int64_t activation);

}  // namespace mobilemamba
