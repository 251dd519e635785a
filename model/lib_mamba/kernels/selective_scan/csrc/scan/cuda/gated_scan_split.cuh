// Only the sum of both directions, for batches too small for a block an image, or for many channels; norm.cuh does the
// rest. A block has `groups` times 32 channels of an image by `segments` of its positions, a warp each.
//
// With several segments, every warp first finds how its segment maps any state, state -> decay * state + added, and so
// the state that enters it; then it scans.
#pragma once

#include "scan/cuda/inputs.cuh"

namespace mobilemamba {

constexpr int kSplitThreads = 512;

// The place of a warp.
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

// How a segment maps the value that enters it: value -> decay * value + added.
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
__host__ __device__ constexpr int split_shared_floats(int groups, int segments) {
  return groups * kLanes * rank_row(NR) + groups * segments * (kChunk * rank_row(NR) + kTile) +
         2 * segments * 2 * kLanes;
}

template <typename T, int NR>
struct SplitWarp {
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  static constexpr int kOwn = kChunk * rank_row(NR) + kTile;

  const ScanInputs<T>& p;
  const Place place;
  const bool exists = place.channel < p.channels;
  float* const all_weights = shared_memory();
  const SharedWeights<NR> weights{all_weights + place.group * kLanes * rank_row(NR)};
  float* const all_stages = all_weights + place.groups * kLanes * rank_row(NR);
  float* const stage = all_stages + threadIdx.x / kLanes * kOwn;
  float* const tile = stage + kChunk * rank_row(NR);
  Passage* const passages = reinterpret_cast<Passage*>(all_stages + blockDim.x / kLanes * kOwn);  // two directions
  Channel parameters;

  __device__ __forceinline__ void start_direction(int direction) {
    put_weights<NR>(p, direction, blockIdx.y * place.groups * kLanes, place.groups * kLanes, all_weights);
    parameters.load(p.dt_bias, p.A_log, direction * p.channels + place.channel, exists);
  }

  __device__ __forceinline__ int64_t at(int chunk, int row) const {
    return (place.image * p.length + chunk * kChunk) * row + place.channel;
  }
  __device__ __forceinline__ int valid(int chunk) const { return exists ? p.valid(chunk) : 0; }

  // Chunk n of the segment, in travel.
  template <int kDirection>
  __device__ __forceinline__ int chunk_of(int n) const {
    return kDirection ? place.first_chunk + place.last_chunk - 1 - n : n;
  }

  template <int kDirection, typename Emit>
  __device__ __forceinline__ void step(int chunk, float& state, Emit&& emit) {
    T x[kChunk];
    load_rows(p.x + at(chunk, p.x_row), p.x_row, valid(chunk), x);
    put_own_stage<NR>(p, place.image, chunk, kDirection, stage);
    project<NR, kExact>(stage, weights, tile);
    __syncwarp();
    scan_chunk<NR, kExact, kDirection == 1>(tile, stage, parameters, x, state, emit);
  }

  template <int kDirection>
  __device__ __forceinline__ void find_passage() {
    start_direction(kDirection);
    Passage own{1.f, 0.f};
    for (int n = place.first_chunk; n < place.last_chunk; ++n) {
      step<kDirection>(chunk_of<kDirection>(n), own.added, [](int, float, float) {});
#pragma unroll 4
      for (int i = 0; i < kChunk; ++i) {
        const float s = softplus2<kExact>(tile[i * kTileRow + lane_index()] + parameters.bias);
        own.decay = decayed<kExact>(own.decay, s, parameters.A);
      }
    }
    passages[(kDirection * place.segments + place.segment) * kLanes + lane_index()] = own;
  }

  template <int kDirection>
  __device__ __forceinline__ void scan(float* sum) {
    start_direction(kDirection);
    float state = entering(passages + kDirection * place.segments * kLanes, place, kDirection);
    const float skip = kDirection ? 0.f : p.skip(place.channel);
    for (int n = place.first_chunk; n < place.last_chunk; ++n) {
      const int chunk = chunk_of<kDirection>(n);
      const int own_valid = valid(chunk);
      float* const to = sum + at(chunk, p.channels);
      float before[kChunk] = {};
      if (kDirection == 0)
        load_rows(to, p.channels, own_valid, before);
      RowWriter<float, kDirection == 1> writer(to, p.channels, own_valid);
      step<kDirection>(
          chunk, state, [&](int i, float x, float y) { writer.put(i, kDirection ? y : fmaf(skip, x, y + before[i])); });
    }
  }
};

// The sum of both directions (B, L, D); grid (B, blocks of channels).
template <typename T, int NR>
__global__ void __launch_bounds__(kSplitThreads, 1) split_kernel(const ScanInputs<T> p, int segments, float* sum) {
  SplitWarp<T, NR> warp{p, Place(segments, p.chunks())};
  if (segments > 1) {
    warp.template find_passage<1>();
    warp.template find_passage<0>();
    __syncthreads();
  }
  warp.template scan<1>(sum);
  warp.template scan<0>(sum);
}

}  // namespace mobilemamba
