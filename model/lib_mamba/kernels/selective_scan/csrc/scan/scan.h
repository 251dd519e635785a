// The operators of the scan (their schemas are in operators.cpp), on the CPU and on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace mobilemamba {

struct Problem;

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

// The result, and what the backward pass starts from: states (B, 2, count, D), and statistics of the sums (B, L, 2),
// mean and 1 / deviation over the channels. The CPU's kernels keep neither: count and L are then 0.
using ScanWithStates = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ScanWithStates gated_scan_with_states(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse);

// Without states and statistics, or with none, they are computed again.
GatedGradients gated_scan_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection,
    const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse,
    const std::optional<at::Tensor>& states, const std::optional<at::Tensor>& statistics);

// As `gated_scan`, of float32 sequences by address: `p` holds batch, length, channels, x, z, the projection, whose rows
// have `width` numbers, and y.
void gated_scan_into(
    const Problem& p, const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A_log,
    const at::Tensor& D_skip, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
    at::IntArrayRef reverse, int64_t width);

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

// The states of two directions with one component: see scan/cuda/chunks.h for their number and distance. [b, 0, j] is
// direction 0's before it takes position j * interval; [b, 1, j] direction 1's before it takes position
// min((j + 1) * interval, L) - 1. Other scans keep neither states nor statistics.
ScanWithStates gated_scan_with_states_cuda(
    const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse);

GatedGradients gated_scan_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& z, const at::Tensor& projection,
    const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D_skip,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps, at::IntArrayRef reverse,
    const std::optional<at::Tensor>& states, const std::optional<at::Tensor>& statistics);

}  // namespace mobilemamba
