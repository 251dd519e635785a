// Gradients of the sum of both directions. A block has `groups` times 32 channels of an image, or 32 channels by
// `segments` of its positions, a warp each, as in gated_scan_split.cuh.
//
// A chunk's states are computed again from the one that entered it (the checkpoint); then the gradient of the state
// runs through the chunk against the direction of travel. Sums over channels are made in the block, sums over images
// by whoever called: in the same order every time, without atomics.
#pragma once

#include "scan/cuda/gated_scan_split.cuh"

namespace mobilemamba {

constexpr int kBackwardThreads = 256;

template <typename T>
struct BackwardOutputs {
  const float* dsum;         // (B, L, D), given
  const float* checkpoints;  // given
  T* dx;                     // (B, L, D)
  float* dprojection;        // (blocks of channels, B, L, 2 * (R + 2))
  float* dparameters;  // (B, segments, 2, D, R + 3): of dt_weight's row, dt_bias, A_log and, at direction 0, D_skip
};

template <int NR>
__host__ __device__ constexpr int backward_shared_floats(int groups, int segments) {
  return groups * kLanes * rank_row(NR) + groups * segments * (kChunk * rank_row(NR) + 2 * kTile) +
         2 * segments * kLanes;
}

template <typename T, int NR>
struct BackwardWarp {
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  static constexpr int kRow = rank_row(NR);
  static constexpr int kOwn = kChunk * kRow + 2 * kTile;

  const ScanInputs<T>& p;
  const BackwardOutputs<T>& out;
  const Place place;
  const bool exists = place.channel < p.channels;
  const int g = lane_index() / 4, q = lane_index() % 4;
  float* const all_weights = shared_memory();
  float* const weights = all_weights + place.group * kLanes * kRow;  // times log2(e)
  float* const all_stages = all_weights + place.groups * kLanes * kRow;
  float* const stage = all_stages + threadIdx.x / kLanes * kOwn;
  float* const tile = stage + kChunk * kRow;
  float* const other_tile = tile + kTile;
  Passage* const passages = reinterpret_cast<Passage*>(all_stages + blockDim.x / kLanes * kOwn);

  Channel parameters;
  float carried;  // the state's gradient from the later steps
  float dweight[2][NR][4];
  float dbias, dA_log, dskip;

  __device__ __forceinline__ int64_t at(int chunk, int row) const {
    return (place.image * p.length + chunk * kChunk) * row + place.channel;
  }

  __device__ __forceinline__ void start_direction(int direction) {
    put_weights<NR>(p, direction, blockIdx.y * place.groups * kLanes, place.groups * kLanes, all_weights);
    parameters.load(p.dt_bias, p.A_log, direction * p.channels + place.channel, exists);
    dbias = dA_log = dskip = 0.f;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          dweight[m][n][i] = 0.f;
  }

  __device__ __forceinline__ void begin(int direction, int chunk) {
    put_own_stage<NR>(p, place.image, chunk, direction, stage);
    project<NR, kExact>(stage, SharedWeights<NR>{weights}, tile);
    __syncwarp();
  }

  __device__ __forceinline__ float2 BC(int i) const {
    return *reinterpret_cast<const float2*>(stage + i * kRow + 8 * NR);
  }

  // How the segment maps the gradient that later steps hand back.
  template <int kDirection>
  __device__ __forceinline__ void find_passage() {
    Passage own{1.f, 0.f};
    for (int n = place.first_chunk; n < place.last_chunk; ++n) {
      const int chunk = kDirection ? n : place.first_chunk + place.last_chunk - 1 - n;
      float dy[kChunk];
      load_rows(out.dsum + at(chunk, p.channels), p.channels, exists ? p.valid(chunk) : 0, dy);
      begin(kDirection, chunk);
#pragma unroll
      for (int step = 0; step < kChunk; ++step) {
        const int i = kDirection ? step : kChunk - 1 - step;
        const float s = softplus2<kExact>(tile[i * kTileRow + lane_index()] + parameters.bias);
        const float decay = decay_of(s, parameters.A);
        own.added = decay * fmaf(BC(i).y, dy[i], own.added);
        own.decay *= decay;
      }
    }
    passages[place.segment * kLanes + lane_index()] = own;
  }

  // Gradients of a chunk; leaves raw's in the tile.
  template <int kDirection>
  __device__ __forceinline__ void scan_back(int chunk, float (&dx)[kChunk], float& dB, float& dC) {
    const int valid = exists ? p.valid(chunk) : 0;
    T x[kChunk];
    float dy[kChunk], before[kChunk];
    load_rows(p.x + at(chunk, p.x_row), p.x_row, valid, x);
    load_rows(out.dsum + at(chunk, p.channels), p.channels, valid, dy);
    float state = exists ? out.checkpoints[p.checkpoint(place.image, kDirection, chunk, place.channel)] : 0.f;
    begin(kDirection, chunk);
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = kDirection ? kChunk - 1 - step : step;
      const int here = i * kTileRow + lane_index();
      const float s = softplus2<kExact>(tile[here] + parameters.bias);
      tile[here] = s;
      before[i] = state;
      state = next_state(state, s, decay_of(s, parameters.A), BC(i).x, static_cast<float>(x[i]));
      other_tile[here] = dy[i] * state;
    }
    __syncwarp();
    dC = row_sum(other_tile);
    __syncwarp();
    const float skip = kDirection ? 0.f : p.skip(place.channel);
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = kDirection ? step : kChunk - 1 - step;
      const int here = i * kTileRow + lane_index();
      const float dstate = fmaf(BC(i).y, dy[i], carried);
      const float s = tile[here], own_x = static_cast<float>(x[i]);
      const StepGradient gradient =
          step_gradient<kExact>(dstate, before[i], s, decay_of(s, parameters.A), parameters.A, BC(i).x, own_x);
      carried = gradient.previous;
      dbias += gradient.raw;
      dA_log += gradient.A_log;
      dx[i] = fmaf(skip, dy[i], gradient.x);
      tile[here] = gradient.raw;
      other_tile[here] = gradient.B;
      if (kDirection == 0)
        dskip = fmaf(dy[i], own_x, dskip);
    }
    __syncwarp();
    dB = row_sum(other_tile);
  }

  // dt_weight's gradient (32, R) += (raw's gradient)^T (32, 16) . dt (16, R).
  __device__ __forceinline__ void add_dweight() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float* draw = tile + (8 * k + q) * kTileRow + 16 * m + g;
        const float a[4] = {draw[0], draw[8], draw[4 * kTileRow], draw[4 * kTileRow + 8]};
#pragma unroll
        for (int n = 0; n < NR; ++n) {
          const float* dt = stage + (8 * k + q) * kRow + 8 * n + g;
          const float b[2] = {dt[0], dt[4 * kRow]};
          multiply<kExact>(dweight[m][n], a, b);
        }
      }
  }

  // dt's gradient (16, R) = raw's gradient (16, 32) . dt_weight (32, R), into the stage with B's and C's.
  __device__ __forceinline__ void put_dprojection(float dB, float dC) {
    float c[NR][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* draw = tile + g * kTileRow + 8 * k + q;
      const float a[4] = {draw[0], draw[8 * kTileRow], draw[4], draw[8 * kTileRow + 4]};
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        const float* weight = weights + (8 * k + q) * kRow + 8 * n + g;
        const float b[2] = {weight[0], weight[4 * kRow]};
        multiply<kExact>(c[n], a, b);
      }
    }
    __syncwarp();  // the stage has been read
#pragma unroll
    for (int n = 0; n < NR; ++n) {
      float* to = stage + g * kRow + 8 * n + 2 * q;
      *reinterpret_cast<float2*>(to) = make_float2(kLn2 * c[n][0], kLn2 * c[n][1]);
      *reinterpret_cast<float2*>(to + 8 * kRow) = make_float2(kLn2 * c[n][2], kLn2 * c[n][3]);
    }
    stage[lane_index() / 2 * kRow + 8 * NR + lane_index() % 2] = lane_index() % 2 ? dC : dB;
  }

  // The sum over the block's channels of the gradients in the warps' stages.
  __device__ __forceinline__ void store_dprojection(int direction, int chunk) {
    const bool is_single = place.groups == 1;
    is_single ? __syncwarp() : __syncthreads();
    const float* first = is_single ? stage : all_stages;
    const int columns = p.rank + 2;
    const int64_t row = (static_cast<int64_t>(blockIdx.y) * p.batch + place.image) * p.length + chunk * kChunk;
    float* const to = out.dprojection + row * p.width() + direction * columns;
    const int threads = is_single ? kLanes : blockDim.x;
    for (int item = is_single ? lane_index() : threadIdx.x; item < p.valid(chunk) * columns; item += threads) {
      const int position = item / columns, column = item % columns;
      const int from = position * kRow + (column < p.rank ? column : 8 * NR + column - p.rank);
      float total = 0.f;
      for (int group = 0; group < place.groups; ++group)
        total += first[group * kOwn + from];
      to[position * p.width() + column] = total;
    }
    if (!is_single)
      __syncthreads();
  }

  __device__ __forceinline__ void store_dparameters(int direction) {
    const int columns = p.rank + 3;
    const int64_t sums = ((place.image * place.segments + place.segment) * 2 + direction) * p.channels;
    const int first = place.channel - lane_index();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int d = first + 16 * m + g + i / 2 * 8, r = 8 * n + 2 * q + i % 2;
          if (d < p.channels && r < p.rank)
            out.dparameters[(sums + d) * columns + r] = dweight[m][n][i];
        }
    if (!exists)
      return;
    float* const own = out.dparameters + (sums + place.channel) * columns + p.rank;
    own[0] = dbias;
    own[1] = dA_log * parameters.A * kLn2;
    own[2] = dskip;
  }

  template <int kDirection>
  __device__ __forceinline__ void run() {
    start_direction(kDirection);
    if (place.segments > 1) {
      find_passage<kDirection>();
      __syncthreads();
    }
    carried = entering(passages, place, kDirection == 0);
    for (int n = place.first_chunk; n < place.last_chunk; ++n) {
      const int chunk = kDirection ? n : place.first_chunk + place.last_chunk - 1 - n;
      const int valid = exists ? p.valid(chunk) : 0;
      float dx[kChunk], dB, dC;
      scan_back<kDirection>(chunk, dx, dB, dC);
      T* const to = out.dx + at(chunk, p.channels);
      T half[kChunk];  // direction 1 adds to the result of direction 0
      if (kDirection == 1)
        load_rows(to, p.channels, valid, half);
      RowWriter<T> writer(to, p.channels, valid);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        writer.put(i, kDirection ? dx[i] + static_cast<float>(half[i]) : dx[i]);
      add_dweight();
      put_dprojection(dB, dC);
      store_dprojection(kDirection, chunk);
    }
    store_dparameters(kDirection);
  }
};

// Grid (B, blocks of channels).
template <typename T, int NR>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    scan_backward_kernel(const ScanInputs<T> p, int segments, const BackwardOutputs<T> out) {
  BackwardWarp<T, NR> warp{p, out, Place(segments, p.chunks())};
  warp.template run<0>();
  warp.template run<1>();
}

}  // namespace mobilemamba
