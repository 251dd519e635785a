// Normalisation over the channels and gate, for a sum of directions that is in memory: a warp has a position.
#pragma once

#include "scan/cuda/inputs.cuh"

namespace mobilemamba {

// Mean over the channels and 1 / deviation of one position.
__device__ __forceinline__ float2 row_statistics(const float* row, int channels, float eps) {
  float sum = 0.f;
  for (int d = lane_index(); d < channels; d += kLanes)
    sum += row[d];
  for (int step = kLanes / 2; step; step /= 2)
    sum += __shfl_xor_sync(kWarp, sum, step);
  const float mean = sum / channels;
  float squares = 0.f;
  for (int d = lane_index(); d < channels; d += kLanes)
    squares = fmaf(row[d] - mean, row[d] - mean, squares);
  for (int step = kLanes / 2; step; step /= 2)
    squares += __shfl_xor_sync(kWarp, squares, step);
  return make_float2(mean, rsqrtf(squares / channels + eps));
}

// y = normalised sum * silu(z), each (rows, D), and the statistics if they are kept; grid (blocks of rows).
template <typename T>
__global__ void norm_gate_kernel(
    const float* sum, const NormInputs<T> norm, int64_t rows, int channels, T* y, float2* statistics) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (row >= rows)
    return;
  const float* own = sum + row * channels;
  const float2 mean_rstd = row_statistics(own, channels, norm.eps);
  if (statistics && lane_index() == 0)
    store_value(statistics + row, mean_rstd);
  for (int d = lane_index(); d < channels; d += kLanes) {
    const float z = static_cast<float>(norm.z[row * norm.z_row + d]);
    const float normed = fmaf((own[d] - mean_rstd.x) * mean_rstd.y, norm.weight[d], norm.bias[d]);
    y[row * channels + d] = static_cast<T>(normed * z * sigmoid(z));
  }
}

// The sum to its gradient, in place, and dz; each block adds its rows up into dnorm (blocks, 2, D). Shared memory:
// 2 * D floats a warp.
template <typename T>
__global__ void norm_gate_backward_kernel(
    const T* grad, int grad_row, float* sum, const NormInputs<T> norm, int64_t rows, int channels, T* dz,
    float* dnorm) {
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes;
  float* const dweight = shared_memory() + 2 * channels * warp;
  float* const dbias = dweight + channels;
  for (int d = lane_index(); d < channels; d += kLanes)
    dweight[d] = dbias[d] = 0.f;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps + warp; row < rows;
       row += static_cast<int64_t>(gridDim.x) * warps) {
    float* const own = sum + row * channels;
    const float2 mean_rstd = row_statistics(own, channels, norm.eps);
    const auto gradient_at = [&](int d, float& normed) {
      normed = (own[d] - mean_rstd.x) * mean_rstd.y;
      return gate_gradient(
          static_cast<float>(grad[row * grad_row + d]), static_cast<float>(norm.z[row * norm.z_row + d]),
          fmaf(normed, norm.weight[d], norm.bias[d]));
    };
    float mean = 0.f, slope = 0.f;
    for (int d = lane_index(); d < channels; d += kLanes) {
      float normed;
      const GateGradient gradient = gradient_at(d, normed);
      dz[row * channels + d] = static_cast<T>(gradient.gate);
      dweight[d] = fmaf(gradient.normed, normed, dweight[d]);
      dbias[d] += gradient.normed;
      mean = fmaf(gradient.normed, norm.weight[d], mean);
      slope = fmaf(gradient.normed * norm.weight[d], normed, slope);
    }
    for (int step = kLanes / 2; step; step /= 2) {
      mean += __shfl_xor_sync(kWarp, mean, step);
      slope += __shfl_xor_sync(kWarp, slope, step);
    }
    mean /= channels;
    slope /= channels;
    for (int d = lane_index(); d < channels; d += kLanes) {
      float normed;
      const GateGradient gradient = gradient_at(d, normed);
      own[d] = (gradient.normed * norm.weight[d] - mean - normed * slope) * mean_rstd.y;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * channels; i += blockDim.x) {
    float total = 0.f;
    for (int w = 0; w < warps; ++w)
      total += shared_memory()[2 * channels * w + i];
    dnorm[static_cast<int64_t>(blockIdx.x) * 2 * channels + i] = total;
  }
}

}  // namespace mobilemamba
