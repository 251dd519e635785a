// The sum of both directions alone, for batches too small for a block an image, or for many channels; norm.cuh does
// the rest. A block has `groups` times 32 channels of an image by `segments` of its positions, a warp each.
//
// With several segments every warp first finds what its segment makes of any state, state -> decay * state + added,
// and so the state that enters it; then it scans.
#pragma once

#include "scan_inputs.cuh"

namespace mobilemamba {

constexpr int kSplitThreads = 512;

// Where a warp stands.
struct Place {
  int64_t image;
  int group, segment, groups, segments;  // within the block
  int channel, first_chunk, last_chunk;  // [first, last)

  __device__ __forceinline__ Place(int segments_, int chunks)
      : image(blockIdx.x), groups(blockDim.x / kLanes / segments_), segments(segments_) {
    const int warp = threadIdx.x / kLanes;
    group = warp % groups;
    segment = warp / groups;
    channel = (blockIdx.y * groups + group) * kLanes + lane_index();
    const int length = (chunks + segments - 1) / segments;
    first_chunk = min(segment * length, chunks);
    last_chunk = min(first_chunk + length, chunks);
  }
};

// What a segment makes of the value that enters it.
struct Passage {
  float decay, added;
};

// The value that enters a segment: those before it in travel, one after the other, applied to zero.
__device__ __forceinline__ float entering(const Passage* passages, const Place& place, bool from_end) {
  float value = 0.f;
  const int count = from_end ? place.segments - 1 - place.segment : place.segment;
  for (int step = 0; step < count; ++step) {
    const int segment = from_end ? place.segments - 1 - step : step;
    const Passage own = passages[segment * kLanes + lane_index()];
    value = fmaf(own.decay, value, own.added);
  }
  return value;
}

template <int NR>
__host__ __device__ constexpr int split_shared_floats(int warps, int segments) {
  return warps * (kTile + kChunk * rank_row(NR)) + 2 * segments * 2 * kLanes;
}

template <typename T, int NR>
struct SplitWarp {
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  static constexpr int kItems = kChunk * (8 * NR + 2);

  const ScanInputs<T>& p;
  const Place place;
  const bool exists = place.channel < p.channels;
  float* const stage = shared_memory() + threadIdx.x / kLanes * (kTile + kChunk * rank_row(NR));
  float* const tile = stage + kChunk * rank_row(NR);
  Passage* const passages = reinterpret_cast<Passage*>(
      shared_memory() + blockDim.x / kLanes * (kTile + kChunk * rank_row(NR)));  // two directions

  RegisterWeights<NR> weights;
  Channel parameters;

  __device__ __forceinline__ void start_direction(int direction) {
    const float* own_weight = p.dt_weight + static_cast<int64_t>(direction) * p.channels * p.rank;
    weights.load(own_weight, place.channel - lane_index(), p.channels, p.rank);
    parameters.load(p.dt_bias, p.A_log, direction * p.channels + place.channel, exists);
  }

  __device__ __forceinline__ int64_t at(int chunk, int row) const {
    return (place.image * p.length + chunk * kChunk) * row + place.channel;
  }

  // x of a chunk to registers, its time steps to the tile.
  __device__ __forceinline__ void begin(int direction, int chunk, float (&x)[kChunk]) {
    T raw[kChunk];
    load_rows(p.x + at(chunk, p.x_row), p.x_row, exists ? p.valid(chunk) : 0, raw);
    const T* from = p.staged_from(place.image, chunk, direction);
    __syncwarp();
    for (int item = lane_index(); item < kItems; item += kLanes)
      staged<NR>(stage, item) = staged_value<NR>(from, p.width(), p.rank, p.valid(chunk), item);
    __syncwarp();
    project<NR, kExact>(stage, weights, tile);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = static_cast<float>(raw[i]);
  }

  template <int kDirection>
  __device__ __forceinline__ void find_passage() {
    start_direction(kDirection);
    Passage own{1.f, 0.f};
    for (int n = place.first_chunk; n < place.last_chunk; ++n) {
      float x[kChunk];
      begin(kDirection, kDirection ? place.first_chunk + place.last_chunk - 1 - n : n, x);
#pragma unroll
      for (int step = 0; step < kChunk; ++step) {
        const int i = kDirection ? kChunk - 1 - step : step;
        const float s = softplus2<kExact>(tile[i * kTileRow + lane_index()] + parameters.bias);
        const float decay = decay_of(s, parameters.A);
        own.added = next_state(own.added, s, decay, stage[i * rank_row(NR) + 8 * NR], x[i]);
        own.decay *= decay;
      }
    }
    passages[(kDirection * place.segments + place.segment) * kLanes + lane_index()] = own;
  }

  template <int kDirection>
  __device__ __forceinline__ void scan(float* sum, float* checkpoints) {
    start_direction(kDirection);
    float state = entering(passages + kDirection * place.segments * kLanes, place, kDirection);
    const float skip = kDirection ? 0.f : p.skip(place.channel);
    for (int n = place.first_chunk; n < place.last_chunk; ++n) {
      const int chunk = kDirection ? place.first_chunk + place.last_chunk - 1 - n : n;
      const int valid = exists ? p.valid(chunk) : 0;
      if (checkpoints && exists)
        checkpoints[p.checkpoint(place.image, kDirection, chunk, place.channel)] = state;
      float x[kChunk], y[kChunk] = {};
      if (!kDirection)
        load_rows(sum + at(chunk, p.channels), p.channels, valid, y);
      begin(kDirection, chunk, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        y[i] = fmaf(skip, x[i], y[i]);
      scan_chunk<NR, kExact, kDirection == 1>(tile, stage, parameters, x, state, y);
      store_rows(sum + at(chunk, p.channels), p.channels, valid, y);
    }
  }
};

// The sum of both directions (B, L, D); grid (B, blocks of channels). Checkpoints only if there is a place for them.
template <typename T, int NR>
__global__ void __launch_bounds__(kSplitThreads)
split_kernel(const ScanInputs<T> p, int segments, float* sum, float* checkpoints) {
  SplitWarp<T, NR> warp{p, Place(segments, p.chunks())};
  if (segments > 1) {
    warp.template find_passage<1>();
    warp.template find_passage<0>();
    __syncthreads();
  }
  warp.template scan<1>(sum, checkpoints);
  warp.template scan<0>(sum, checkpoints);
}

}  // namespace mobilemamba
