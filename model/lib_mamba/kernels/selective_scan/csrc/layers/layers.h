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

// act(x * factor) + residual, with a factor for each channel (C), or 1 where it is not defined; to `out`, which may be
// x.
void scale_into(
    const at::Tensor& x, const at::Tensor& factor, Activation activation, const at::Tensor& residual,
    const at::Tensor& out);

// The gradient of x before act(x), to `out`, which may be `grad`.
void activation_gradient_into(
    const at::Tensor& grad, const at::Tensor& x, Activation activation, const at::Tensor& out);

// Sums over all pixels for each channel, (C): of a map, and of the product of two.
at::Tensor channel_sums(const at::Tensor& x);
at::Tensor channel_products(const at::Tensor& x, const at::Tensor& y);

// The same for each image, (B, C, 1, 1): means, sums of the product of two maps, and x * factor + shift with such a
// factor and, where it is defined, shift.
at::Tensor image_means(const at::Tensor& x);
at::Tensor image_products(const at::Tensor& x, const at::Tensor& y);
at::Tensor scale_images(const at::Tensor& x, const at::Tensor& factor, const at::Tensor& shift);

// Products with a weight (C', C, 1, 1), plus a bias where there is one. Gradients of x are added to `base`, where there
// is one.
at::Tensor product(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {}, Activation activation = kNone);
Gradients product_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& base = {});

// A depthwise convolution with a weight (C, 1, side, side), padded by half a side. The gradient of x is written to
// `out`, or where there is none to a new map.
at::Tensor convolve(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {}, int64_t stride = 1,
    Activation activation = kNone);
Gradients convolve_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, int64_t stride = 1,
    const at::Tensor& base = {}, const at::Tensor& out = {});

// A convolution (C', C, 3, 3) of stride 2 of relu(norm(x)), and gradients of that.
at::Tensor strided_conv(const at::Tensor& x, const Norm& norm, const at::Tensor& weight);
Gradients strided_conv_backward(
    const at::Tensor& grad, const at::Tensor& x, const Norm& norm, const at::Tensor& weight);

// The wavelet branch, plus base, by its packed weight (side, side, 4C); the gradient of that weight.
at::Tensor wavelet(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& base);
at::Tensor wavelet_weight_gradient(const at::Tensor& grad, const at::Tensor& x, int64_t side);

// A depthwise convolution by its packed weight (side, side, C): act(conv + bias), then times scale, plus shift.
at::Tensor depthwise(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, int64_t stride, int64_t padding, int64_t activation);

// The layers of a folded network on maps by address, to `out`. Weights are packed (layers/weights.h). Where not said
// otherwise, the pixels of a map are equally far apart from its first to its last.

// A depthwise convolution, on maps of any strides, is described and then run.
Depthwise depthwise_of(
    const Map& x, const Map& out, const at::Tensor& weight, const at::Tensor& bias, int64_t stride, int64_t padding,
    int64_t activation);
void scale_and_shift(Depthwise& d, const at::Tensor& scale, const at::Tensor& shift);
void run(const Depthwise& d, int64_t images);

// act(wavelet branch + base), on maps of any strides.
void wavelet_into(
    const Map& x, int64_t images, const at::Tensor& weight, const Map& base, Activation activation, const Map& out);

// act(x W + b) + residual, which may have no address.
void pointwise_into(
    const Map& x, int64_t images, const at::Tensor& weight, const at::Tensor& bias, const Matrix& residual,
    Activation activation, const Map& out);

// The feed-forward of y, plus y and the residual, where y is a depthwise convolution of x, or x where its taps are not
// defined. Parameters: taps and their bias; weight and bias of the first product, of the second.
constexpr int64_t kFfnParameters = 6;
void ffn_into(const Map& x, int64_t images, at::TensorList parameters, const Matrix& residual, const Map& out);

// x times the gates of its channels; `out` may be x. Parameters: weight and bias of the reduction, of the expansion.
constexpr int64_t kSqueezeExciteParameters = 4;
void squeeze_excite_into(const Map& x, int64_t images, at::TensorList parameters, const Map& out);

// Means over the pixels of each image, to rows of as many floats as there are channels.
void means_into(const Map& x, int64_t images, float* mean);

// Square convolutions over all channels one after the other, a ReLU between them, of images in any layout. The shape of
// the result, and the result.
Map convs_shape(const at::Tensor& x, at::TensorList biases, int64_t side, int64_t stride, int64_t padding);
void convs_into(
    const at::Tensor& x, at::TensorList weights, at::TensorList biases, int64_t side, int64_t stride, int64_t padding,
    const Map& out);

// The residual mixer; its parameters stand in mixer.cpp.
constexpr int64_t kMixerParameters = 21;
void mixer_into(
    const Map& x, int64_t images, at::TensorList parameters, at::IntArrayRef split, at::IntArrayRef reverse,
    double norm_eps, const Map& out);

// A feed-forward, the mixer, and another feed-forward, with the residual around them all. Parameters: of each in turn.
constexpr int64_t kBlockParameters = 2 * kFfnParameters + kMixerParameters;
void block_into(
    const Map& x, int64_t images, at::TensorList parameters, at::IntArrayRef split, at::IntArrayRef reverse,
    double norm_eps, const Map& out);

// Inverted bottleneck of stride 2 with squeeze-excite; the shape of its result, which checks the number of parameters.
// Parameters: weight and bias of the product that widens, taps and bias of the depthwise convolution, those of
// squeeze-excite, weight and bias of the product that narrows.
constexpr int64_t kPatchMergingParameters = 6 + kSqueezeExciteParameters;
Map patch_merging_shape(const Map& x, at::TensorList parameters);
void patch_merging_into(const Map& x, int64_t images, at::TensorList parameters, const Map& out);

}  // namespace mobilemamba
