// The operators of the scan (their schemas are in operators.cpp), on the CPU and on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mobilemamba {

// Gradients of the arguments from x to D_skip.
using ScanGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of the arguments from x to norm_bias.
using GatedGradients = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::Tensor selective_scan(
    const at::Tensor& x, const at::Tensor& projection, const at::Tensor& dt_weight, const at::Tensor& dt_bias,
    const at::Tensor& A_log, const at::Tensor& D_skip, at::IntArrayRef reverse);

ScanGradients selective_scan_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& projection, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip, at::IntArrayRef reverse);

at::Tensor gated_scan(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse);

GatedGradients gated_scan_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection,
    const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse);

at::Tensor selective_scan_cuda(
    const at::Tensor& x, const at::Tensor& projection, const at::Tensor& dt_weight, const at::Tensor& dt_bias,
    const at::Tensor& A_log, const at::Tensor& D_skip, at::IntArrayRef reverse);

ScanGradients selective_scan_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& projection, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip, at::IntArrayRef reverse);

at::Tensor gated_scan_cuda(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse);

GatedGradients gated_scan_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection,
    const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse);

}  // namespace mobilemamba
