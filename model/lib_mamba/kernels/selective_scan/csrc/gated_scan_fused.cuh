// The scan in both directions, normalisation and gate in one kernel: a block has an image, with all its channels.
//
// Two sweeps: direction 1 from the last chunk of positions to the first leaves its sums where the result goes; direction
// 0 on the way back adds its own, and the block, which now has all channels of the chunk, normalises and gates.
#pragma once

#include "scan_inputs.cuh"

namespace mobilemamba {

// What the fused kernel writes: y going forward; the rest, and checkpoints, going backward (up to the scan itself).
template <typename T>
struct FusedOutputs {
  T* y;          // (B, L, D)
  const T* grad;
  int grad_row;
  T* dz;              // (B, L, D)
  float* dsum;        // (B, L, D), gradient of the sum of the directions
  float* dnorm;       // (B, 2, D)
  float* checkpoints;
};

constexpr int kFusedThreads = 576;

template <int NR>
__host__ __device__ constexpr int fused_shared_floats(int warps) {
  return 2 * kChunk * rank_row(NR) + warps * (kTile + 3 * 2 * kChunk);
}

// Mean and 1 / deviation over all channels for position p, in lanes p and p + 16.
__device__ __forceinline__ float2 combine_moments(const float2* moments, int warps, int channels, float eps) {
  const int p = lane_index() % kChunk, half = lane_index() / kChunk;
  const int last = channels - kLanes * (warps - 1);
  float sum = 0.f;
  for (int w = half; w < warps; w += 2)
    sum = fmaf(w == warps - 1 ? last : kLanes, moments[w * kChunk + p].x, sum);
  sum += __shfl_xor_sync(kWarp, sum, kChunk);
  const float mean = sum / channels;
  float squares = 0.f;
  for (int w = half; w < warps; w += 2) {
    const float2 own = moments[w * kChunk + p];
    const float deviation = own.x - mean;
    squares += fmaf(deviation * (w == warps - 1 ? last : kLanes), deviation, own.y);
  }
  squares += __shfl_xor_sync(kWarp, squares, kChunk);
  return make_float2(mean, rsqrtf(squares / channels + eps));
}

// Sum of pairs over the warps for position p, likewise.
__device__ __forceinline__ float2 combine_sums(const float2* sums, int warps) {
  const int p = lane_index() % kChunk;
  float2 total = make_float2(0.f, 0.f);
  for (int w = lane_index() / kChunk; w < warps; w += 2) {
    const float2 own = sums[w * kChunk + p];
    total.x += own.x;
    total.y += own.y;
  }
  total.x += __shfl_xor_sync(kWarp, total.x, kChunk);
  total.y += __shfl_xor_sync(kWarp, total.y, kChunk);
  return total;
}

// A warp of the block: 32 channels of the image, through both sweeps.
template <typename T, int NR, bool kBackward>
struct FusedWarp {
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  static constexpr int kStage = kChunk * rank_row(NR);
  static constexpr int kItems = kChunk * (8 * NR + 2);

  const ScanInputs<T>& p;
  const NormInputs<T>& norm;
  const FusedOutputs<T>& out;
  const int64_t image = blockIdx.x;
  const int channel = threadIdx.x;
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = lane_index();
  const bool exists = channel < p.channels;

  float* const stages = shared_memory();  // two, so that one fills while the other is read
  float* const tile = stages + 2 * kStage + warp * kTile;
  float2* const moments = reinterpret_cast<float2*>(stages + 2 * kStage + warps * kTile);
  float2* const sums = moments + warps * kChunk;
  float2* const own_norm = sums + warps * kChunk + warp * kChunk;

  RegisterWeights<NR> weights;
  Channel parameters;
  float state;
  T next_x[kChunk];
  float next_item;
  float norm_weight, norm_bias, dnorm_weight = 0.f, dnorm_bias = 0.f;

  // Step k of 2 * chunks: first direction 1 from the last chunk to the first, then direction 0 back again.
  __device__ __forceinline__ int chunk_of(int k) const {
    return k < p.chunks() ? p.chunks() - 1 - k : k - p.chunks();
  }
  __device__ __forceinline__ int direction_of(int k) const { return k < p.chunks(); }
  __device__ __forceinline__ int valid(int chunk) const { return exists ? p.valid(chunk) : 0; }
  __device__ __forceinline__ float* stage_of(int k) const { return stages + k % 2 * kStage; }
  __device__ __forceinline__ int64_t at(int chunk, int row) const {
    return (image * p.length + chunk * kChunk) * row + channel;
  }

  __device__ __forceinline__ void start_direction(int direction) {
    const float* own_weight = p.dt_weight + static_cast<int64_t>(direction) * p.channels * p.rank;
    weights.load(own_weight, warp * kLanes, p.channels, p.rank);
    parameters.load(p.dt_bias, p.A_log, direction * p.channels + channel, exists);
    state = 0.f;
  }

  __device__ __forceinline__ float item(int k, int index) const {
    const int chunk = chunk_of(k);
    return staged_value<NR>(p.staged_from(image, chunk, direction_of(k)), p.width(), p.rank, p.valid(chunk), index);
  }

  // Have step k's x and share of the stage on their way.
  __device__ __forceinline__ void fetch(int k) {
    const int chunk = chunk_of(k);
    load_rows(p.x + at(chunk, p.x_row), p.x_row, valid(chunk), next_x);
    if (threadIdx.x < kItems)
      next_item = item(k, threadIdx.x);
  }

  __device__ __forceinline__ void put_stage(int k) {
    if (threadIdx.x < kItems)
      staged<NR>(stage_of(k), threadIdx.x) = next_item;
    for (int index = threadIdx.x + blockDim.x; index < kItems; index += blockDim.x)
      staged<NR>(stage_of(k), index) = item(k, index);
  }

  // Step k: add C * state at every position to y, and skip * x.
  template <int kDirection>
  __device__ __forceinline__ void step(int k, float skip, float (&y)[kChunk]) {
    if (kBackward && exists)
      out.checkpoints[p.checkpoint(image, kDirection, chunk_of(k), channel)] = state;
    float x[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[i] = static_cast<float>(next_x[i]);
      y[i] = fmaf(skip, x[i], y[i]);
    }
    __syncthreads();
    const bool is_last = k + 1 == 2 * p.chunks();
    if (!is_last)
      fetch(k + 1);
    project<NR, kExact>(stage_of(k), weights, tile);
    __syncwarp();
    scan_chunk<NR, kExact, kDirection == 1>(tile, stage_of(k), parameters, x, state, y);
    __syncwarp();
    if (!is_last)
      put_stage(k + 1);
  }

  // Mean over the channels and 1 / deviation of y at every position, to own_norm.
  __device__ __forceinline__ void normalize(const float (&y)[kChunk]) {
    put_column(tile, y);
    __syncwarp();
    const float2 own_moments = row_moments(tile, min(kLanes, p.channels - warp * kLanes));
    if (lane % 2 == 0)
      moments[warp * kChunk + lane / 2] = own_moments;
    __syncthreads();
    const float2 mean_rstd = combine_moments(moments, warps, p.channels, norm.eps);
    if (lane < kChunk)
      own_norm[lane] = mean_rstd;
    __syncwarp();
  }

  __device__ __forceinline__ void gate_forward(int chunk, const T (&gate)[kChunk], float (&y)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float2 mean_rstd = own_norm[i];
      const float opening = static_cast<float>(gate[i]);
      y[i] = fmaf((y[i] - mean_rstd.x) * mean_rstd.y, norm_weight, norm_bias) * opening * sigmoid(opening);
    }
    store_rows(out.y + at(chunk, p.channels), p.channels, valid(chunk), y);
  }

  // From y to its gradient.
  __device__ __forceinline__ void gate_backward(int chunk, const T (&gate)[kChunk], float (&y)[kChunk]) {
    T grad[kChunk];
    load_rows(out.grad + at(chunk, out.grad_row), out.grad_row, valid(chunk), grad);
    float dnormed[kChunk], values[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float2 mean_rstd = own_norm[i];
      y[i] = (y[i] - mean_rstd.x) * mean_rstd.y;
      const GateGradient gradient = gate_gradient(static_cast<float>(grad[i]), static_cast<float>(gate[i]),
                                                  fmaf(y[i], norm_weight, norm_bias));
      values[i] = gradient.gate;
      dnorm_weight = fmaf(gradient.normed, y[i], dnorm_weight);
      dnorm_bias += gradient.normed;
      dnormed[i] = gradient.normed * norm_weight;
    }
    store_rows(out.dz + at(chunk, p.channels), p.channels, valid(chunk), values);
    float2 own_sums;
    put_column(tile, dnormed);
    __syncwarp();
    own_sums.x = row_sum(tile);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      values[i] = dnormed[i] * y[i];
    put_column(tile, values);
    __syncwarp();
    own_sums.y = row_sum(tile);
    if (lane % 2 == 0)
      sums[warp * kChunk + lane / 2] = own_sums;
    __syncthreads();
    // Every warp has read the moments: the means may take the place of this warp's.
    const float2 total = combine_sums(sums, warps);
    if (lane < kChunk)
      moments[warp * kChunk + lane] = make_float2(total.x / p.channels, total.y / p.channels);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float2 means = moments[warp * kChunk + i];
      y[i] = (dnormed[i] - means.x - y[i] * means.y) * own_norm[i].y;
    }
    store_rows(out.dsum + at(chunk, p.channels), p.channels, valid(chunk), y);
  }

  __device__ __forceinline__ void run() {
    const int chunks = p.chunks();
    norm_weight = exists ? norm.weight[channel] : 0.f;
    norm_bias = exists ? norm.bias[channel] : 0.f;
    start_direction(1);
    fetch(0);
    put_stage(0);
    for (int k = 0; k < chunks; ++k) {
      float y[kChunk] = {};
      step<1>(k, 0.f, y);
      keep(chunk_of(k), y);
    }
    start_direction(0);
    const float skip = p.skip(channel);
    for (int k = chunks; k < 2 * chunks; ++k) {
      float y[kChunk];
      T gate[kChunk];
      kept(chunk_of(k), y);
      step<0>(k, skip, y);
      load_rows(norm.z + at(chunk_of(k), norm.z_row), norm.z_row, valid(chunk_of(k)), gate);
      normalize(y);
      if (kBackward)
        gate_backward(chunk_of(k), gate, y);
      else
        gate_forward(chunk_of(k), gate, y);
    }
    if (kBackward && exists) {
      out.dnorm[image * 2 * p.channels + channel] = dnorm_weight;
      out.dnorm[(image * 2 + 1) * p.channels + channel] = dnorm_bias;
    }
  }

  // Direction 1 waits where the result goes: going forward in T, which rounds once more, as much as the result.
  __device__ __forceinline__ void keep(int chunk, const float (&y)[kChunk]) {
    if (kBackward)
      store_rows(out.dsum + at(chunk, p.channels), p.channels, valid(chunk), y);
    else
      store_rows(out.y + at(chunk, p.channels), p.channels, valid(chunk), y);
  }

  __device__ __forceinline__ void kept(int chunk, float (&y)[kChunk]) const {
    if (kBackward) {
      load_rows(out.dsum + at(chunk, p.channels), p.channels, valid(chunk), y);
      return;
    }
    T before[kChunk];
    load_rows(out.y + at(chunk, p.channels), p.channels, valid(chunk), before);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      y[i] = static_cast<float>(before[i]);
  }
};

// Grid (B), a warp for every 32 channels.
template <typename T, int NR, bool kBackward>
__global__ void __launch_bounds__(kFusedThreads)
fused_kernel(const ScanInputs<T> p, const NormInputs<T> norm, const FusedOutputs<T> out) {
  FusedWarp<T, NR, kBackward> warp{p, norm, out};
  warp.run();
}

}  // namespace mobilemamba
