// The scan in both directions, normalisation and gate in one kernel: a block has an image, with all its channels.
//
// Two sweeps: direction 1 from the last chunk of positions to the first leaves its sums where the result goes;
// direction 0 on the way back adds its own, and the block, which now has all channels of the chunk, normalises and
// gates.
#pragma once

#include "scan/cuda/inputs.cuh"

namespace mobilemamba {

constexpr int kFusedThreads = 576;

template <int NR>
__host__ __device__ constexpr int fused_shared_floats(int warps) {
  return 2 * kChunk * rank_row(NR) + warps * (kTile + 2 * 2 * kChunk);
}

// Mean and 1 / deviation over all channels for position p, in lanes p and p + 16.
__device__ __forceinline__ float2 combine_moments(const float2* moments, int warps, int channels, float eps) {
  const int p = lane_index() % kChunk, half = lane_index() / kChunk;
  constexpr float kFull = kLanes;
  const float last = channels - kLanes * (warps - 1);
  float sum = 0.f;
  for (int w = half; w < warps; w += 2)
    sum = fmaf(w == warps - 1 ? last : kFull, moments[w * kChunk + p].x, sum);
  sum += __shfl_xor_sync(kWarp, sum, kChunk);
  const float mean = sum / channels;
  float squares = 0.f;
  for (int w = half; w < warps; w += 2) {
    const float2 own = moments[w * kChunk + p];
    const float deviation = own.x - mean;
    squares += fmaf(deviation * (w == warps - 1 ? last : kFull), deviation, own.y);
  }
  squares += __shfl_xor_sync(kWarp, squares, kChunk);
  return make_float2(mean, rsqrtf(squares / channels + eps));
}

// A warp of the block: 32 channels of the image, through both sweeps.
template <typename T, int NR>
struct FusedWarp {
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  static constexpr int kStage = kChunk * rank_row(NR);
  static constexpr int kItems = kChunk * (8 * NR + 2);

  const ScanInputs<T>& p;
  const NormInputs<T>& norm;
  T* const result;           // (B, L, D)
  float2* const statistics;  // as Kept has them
  const int64_t image = blockIdx.x;
  const int channel = threadIdx.x;
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = lane_index();
  const bool exists = channel < p.channels;

  float* const stages = shared_memory();  // two, so that one fills while the other is read
  float* const tile = stages + 2 * kStage + warp * kTile;
  float2* const moments = reinterpret_cast<float2*>(stages + 2 * kStage + warps * kTile);
  float2* const own_norm = moments + warps * kChunk + warp * kChunk;

  RegisterWeights<NR> weights;
  Channel parameters;
  float state;
  T x[kChunk];
  float next_item;
  float norm_weight, norm_bias;

  // Step k of 2 * chunks: first direction 1 from the last chunk to the first, then direction 0 back again.
  __device__ __forceinline__ int chunk_of(int k) const { return k < p.chunks() ? p.chunks() - 1 - k : k - p.chunks(); }
  __device__ __forceinline__ int direction_of(int k) const { return k < p.chunks(); }
  __device__ __forceinline__ bool is_last(int k) const { return k + 1 == 2 * p.chunks(); }
  __device__ __forceinline__ int valid(int chunk) const { return exists ? p.valid(chunk) : 0; }
  __device__ __forceinline__ float* stage_of(int k) const { return stages + k % 2 * kStage; }
  __device__ __forceinline__ int64_t at(int chunk, int row) const {
    return (image * p.length + chunk * kChunk) * row + channel;
  }
  // Direction 1 waits here, rounded once more, as much as the result.
  __device__ __forceinline__ T* result_at(int chunk) const { return result + at(chunk, p.channels); }

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

  // Load this thread's items of step k's stage into registers, and later put them there.
  __device__ __forceinline__ void fetch_stage(int k) {
    if (threadIdx.x < kItems)
      next_item = item(k, threadIdx.x);
  }
  __device__ __forceinline__ void put_stage(int k) {
    if (threadIdx.x < kItems)
      staged<NR>(stage_of(k), threadIdx.x) = next_item;
    for (int index = threadIdx.x + blockDim.x; index < kItems; index += blockDim.x)
      staged<NR>(stage_of(k), index) = item(k, index);
  }
  __device__ __forceinline__ void fetch_x(int k) {
    const int chunk = chunk_of(k);
    load_rows(p.x + at(chunk, p.x_row), p.x_row, valid(chunk), x);
  }

  // Step k: emit as scan_chunk does, and load the next step's inputs ahead.
  template <int kDirection, typename Emit>
  __device__ __forceinline__ void step(int k, Emit&& emit) {
    __syncthreads();
    if (!is_last(k))
      fetch_stage(k + 1);
    project<NR, kExact>(stage_of(k), weights, tile);
    __syncwarp();
    scan_chunk<NR, kExact, kDirection == 1>(tile, stage_of(k), parameters, x, state, emit);
    if (!is_last(k)) {
      fetch_x(k + 1);
      put_stage(k + 1);
    }
    __syncwarp();
  }

  // Mean over the channels and 1 / deviation of every position of the tile, to own_norm.
  __device__ __forceinline__ void normalize(int chunk) {
    const float2 own_moments = row_moments(tile, min(kLanes, p.channels - warp * kLanes));
    if (lane % 2 == 0)
      moments[warp * kChunk + lane / 2] = own_moments;
    __syncthreads();
    const float2 mean_rstd = combine_moments(moments, warps, p.channels, norm.eps);
    if (lane < kChunk)
      own_norm[lane] = mean_rstd;
    if (statistics && warp == 0 && lane < p.valid(chunk))
      store_value(statistics + image * p.length + chunk * kChunk + lane, mean_rstd);
    __syncwarp();
  }

  __device__ __forceinline__ float normed(int i) const {
    const float2 mean_rstd = own_norm[i];
    return (tile[i * kTileRow + lane] - mean_rstd.x) * mean_rstd.y;
  }

  // From the sum, in the tile, to y.
  __device__ __forceinline__ void open_gate(int chunk, const T (&gate)[kChunk]) {
    RowWriter<T> y(result_at(chunk), p.channels, valid(chunk));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float opening = static_cast<float>(gate[i]);
      y.put(i, fmaf(normed(i), norm_weight, norm_bias) * opening * sigmoid(opening));
    }
  }

  __device__ __forceinline__ void run() {
    const int chunks = p.chunks();
    norm_weight = exists ? norm.weight[channel] : 0.f;
    norm_bias = exists ? norm.bias[channel] : 0.f;
    start_direction(1);
    fetch_stage(0);
    fetch_x(0);
    put_stage(0);
    for (int k = 0; k < chunks; ++k) {
      RowWriter<T, true> sum(result_at(chunk_of(k)), p.channels, valid(chunk_of(k)));
      step<1>(k, [&](int i, float, float y) { sum.put(i, y); });
    }
    start_direction(0);
    const float skip = p.skip(channel);
    for (int k = chunks; k < 2 * chunks; ++k) {
      const int chunk = chunk_of(k);
      T before[kChunk];
      load_rows(result_at(chunk), p.channels, valid(chunk), before);
      step<0>(k, [&](int i, float own_x, float y) {
        tile[i * kTileRow + lane] = fmaf(skip, own_x, y + static_cast<float>(before[i]));
      });
      T gate[kChunk];
      load_rows(norm.z + at(chunk, norm.z_row), norm.z_row, valid(chunk), gate);
      normalize(chunk);
      open_gate(chunk, gate);
      __syncwarp();
    }
  }
};

// Grid (B), a warp for every 32 channels.
template <typename T, int NR>
__global__ void __launch_bounds__(kFusedThreads)
    fused_kernel(const ScanInputs<T> p, const NormInputs<T> norm, T* result, float2* statistics) {
  FusedWarp<T, NR> warp{p, norm, result, statistics};
  warp.run();
}

}  // namespace mobilemamba
