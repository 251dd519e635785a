// The inputs of the kernels for two directions, forward and backward, with one state component.
#pragma once

#include "scan/cuda/tile.cuh"

namespace mobilemamba {

// B batch, L length, D channels, R rank of the time step. Sequences are (B * L) rows of D, strides in elements.
template <typename T>
struct ScanInputs {
  const T* x;
  int x_row;
  const T* projection;     // (B, L, 2 * (R + 2))
  const float* dt_weight;  // (2, D, R)
  const float* dt_bias;    // (2, D)
  const float* A_log;      // (2, D)
  const float* D_skip;     // (2, D)
  int batch, length, channels, rank;

  __host__ __device__ int chunks() const { return (length + kChunk - 1) / kChunk; }
  __host__ __device__ int width() const { return 2 * (rank + 2); }
  __device__ const T* staged_from(int64_t image, int chunk, int direction) const {
    return projection + (image * length + chunk * kChunk) * width() + direction * (rank + 2);
  }
  __device__ int valid(int chunk) const { return min(kChunk, length - chunk * kChunk); }
  __device__ float skip(int channel) const {
    return channel < channels ? D_skip[channel] + D_skip[channels + channel] : 0.f;
  }
};

// dt_weight * log2(e) of one direction and `count` channels to shared memory as SharedWeights takes it, by the block.
template <int NR, typename T>
__device__ __forceinline__ void put_weights(
    const ScanInputs<T>& p, int direction, int first_channel, int count, float* weights) {
  __syncthreads();
  for (int item = threadIdx.x; item < count * 8 * NR; item += blockDim.x) {
    const int d = item / (8 * NR), r = item % (8 * NR);
    const bool is_weight = first_channel + d < p.channels && r < p.rank;
    const int64_t index = (static_cast<int64_t>(direction) * p.channels + first_channel + d) * p.rank + r;
    weights[d * rank_row(NR) + r] = is_weight ? kLog2e * p.dt_weight[index] : 0.f;
  }
  __syncthreads();
}

// A chunk's staged projection by a warp for itself.
template <int NR, typename T>
__device__ __forceinline__ void put_own_stage(
    const ScanInputs<T>& p, int64_t image, int chunk, int direction, float* stage) {
  const T* from = p.staged_from(image, chunk, direction);
  __syncwarp();
  for (int item = lane_index(); item < kChunk * (8 * NR + 2); item += kLanes)
    staged<NR>(stage, item) = staged_value<NR>(from, p.width(), p.rank, p.valid(chunk), item);
  __syncwarp();
}

template <typename T>
struct NormInputs {
  const T* z;
  int z_row;
  const float* weight;  // (D)
  const float* bias;    // (D)
  float eps;
};

// What the forward pass keeps for the backward pass, in training; null otherwise.
struct Kept {
  float* states;       // (B, 2, count, D): see chunks.h
  float2* statistics;  // (B, L): mean over the channels and 1 / deviation of the sums
};

}  // namespace mobilemamba
