// A warp's tile: 16 positions by 32 channels, and the matrix products around it.
//
// In registers a lane holds one channel of the tile, all 16 positions (float[16]). In shared memory the tile is
// [16][kTileRow], rows being positions. The projection of the 16 positions, for one direction, is staged in shared
// memory as [16][rank_row], rows being dt_0 .. dt_{R-1}, zeros up to 8 * NR, then ln 2 * B, and C.
#pragma once

#include "scan/cuda/step.cuh"

namespace mobilemamba {

constexpr int kChunk = 16;
constexpr int kLanes = 32;
constexpr int kTileRow = 36;  // 4 more than the lanes: neither rows nor columns of fragments fall on the same bank
constexpr int kTile = kChunk * kTileRow;
constexpr unsigned kWarp = 0xffffffffu;

__host__ __device__ constexpr int rank_row(int num_blocks) {
  return 8 * num_blocks + 4;
}

__device__ __forceinline__ int lane_index() {
  return threadIdx.x % kLanes;
}

// c += a b. Three products in TF32 are as good as one in float32.
template <bool kExact>
__device__ __forceinline__ void multiply(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  float a_high[4], b_high[2];
  for (int i = 0; i < 4; ++i)
    a_high[i] = round_tf32(a[i]);
  for (int i = 0; i < 2; ++i)
    b_high[i] = round_tf32(b[i]);
  if (kExact) {
    float a_low[4], b_low[2];
    for (int i = 0; i < 4; ++i)
      a_low[i] = round_tf32(a[i] - a_high[i]);
    for (int i = 0; i < 2; ++i)
      b_low[i] = round_tf32(b[i] - b_high[i]);
    multiply_tf32(c, a_low, b_high);
    multiply_tf32(c, a_high, b_low);
  }
  multiply_tf32(c, a_high, b_high);
}

// Element `item` of a chunk's staged projection (items are (8 * NR + 2) a position), from global memory.
template <int NR, typename T>
__device__ __forceinline__ float staged_value(const T* chunk, int row, int rank, int valid, int item) {
  constexpr int kItems = 8 * NR + 2;
  const int position = item / kItems;
  const int column = item % kItems;
  const bool is_dt = column < 8 * NR;
  if (position >= valid || (is_dt && column >= rank))
    return 0.f;
  const float value = static_cast<float>(chunk[position * row + (is_dt ? column : rank + column - 8 * NR)]);
  return column == 8 * NR ? kLn2 * value : value;
}

template <int NR>
__device__ __forceinline__ float& staged(float* stage, int item) {
  constexpr int kItems = 8 * NR + 2;
  return stage[item / kItems * rank_row(NR) + item % kItems];
}

// dt_weight * log2(e) of a warp's 32 channels and one direction, in registers, as `project` takes it.
template <int NR>
struct RegisterWeights {
  float value[4][NR][2];

  __device__ __forceinline__ void load(const float* dt_weight, int channel, int channels, int rank) {
    const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int k = 0; k < NR; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int d = channel + 8 * j + g, r = 8 * k + q + 4 * i;
          value[j][k][i] = d < channels && r < rank ? kLog2e * dt_weight[static_cast<int64_t>(d) * rank + r] : 0.f;
        }
  }

  __device__ __forceinline__ float get(int j, int k, int i) const { return value[j][k][i]; }
};

// The same in shared memory, [32][rank_row].
template <int NR>
struct SharedWeights {
  const float* value;

  __device__ __forceinline__ float get(int j, int k, int i) const {
    const int g = lane_index() / 4, q = lane_index() % 4;
    return value[(8 * j + g) * rank_row(NR) + 8 * k + q + 4 * i];
  }
};

// tile = staged dt (16, R) . dt_weight^T (R, 32), times log2(e); complete after a __syncwarp.
template <int NR, bool kExact, typename Weights>
__device__ __forceinline__ void project(const float* stage, const Weights& weights, float* tile) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  constexpr int kRow = rank_row(NR);
  float c[4][4] = {};
#pragma unroll
  for (int k = 0; k < NR; ++k) {
    const float* dt = stage + g * kRow + 8 * k + q;
    const float a[4] = {dt[0], dt[8 * kRow], dt[4], dt[8 * kRow + 4]};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float b[2] = {weights.get(j, k, 0), weights.get(j, k, 1)};
      multiply<kExact>(c[j], a, b);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float* to = tile + g * kTileRow + 8 * j + 2 * q;
    *reinterpret_cast<float2*>(to) = make_float2(c[j][0], c[j][1]);
    *reinterpret_cast<float2*>(to + 8 * kTileRow) = make_float2(c[j][2], c[j][3]);
  }
}

// One channel of one direction.
struct Channel {
  float bias, A;  // log2(e) * dt_bias, -exp(A_log)

  __device__ __forceinline__ void load(const float* dt_bias, const float* A_log, int64_t index, bool exists) {
    bias = exists ? kLog2e * dt_bias[index] : 0.f;
    A = exists ? -expf(A_log[index]) : -1.f;
  }
};

// Run a state through a chunk; emit(i, x, C * state) takes the result at position i. Positions past the end have x = 0
// and do nothing: backwards they come first, before there is a state; forwards nothing comes after them.
template <int NR, bool kExact, bool kReverse, typename T, typename Emit>
__device__ __forceinline__ void scan_chunk(
    const float* tile, const float* stage, const Channel& channel, const T (&x)[kChunk], float& state, Emit&& emit) {
#pragma unroll
  for (int step = 0; step < kChunk; ++step) {
    const int i = kReverse ? kChunk - 1 - step : step;
    const float own_x = static_cast<float>(x[i]);
    const float s = softplus2<kExact>(tile[i * kTileRow + lane_index()] + channel.bias);
    const float2 BC = *reinterpret_cast<const float2*>(stage + i * rank_row(NR) + 8 * NR);
    state = advanced<kExact>(state, s, channel.A, BC.x, own_x);
    emit(i, own_x, BC.y * state);
  }
}

// Mean and sum of squared deviations over the first `columns` lanes, to the same lanes. Deviations are taken from one
// of the values, so that a mean far from zero costs no accuracy.
__device__ __forceinline__ float2 row_moments(const float* tile, int columns) {
  const float* row = tile + lane_index() / 2 * kTileRow;
  const int start = lane_index() % 2 * 16;
  const float shift = row[0];
  float sum = 0.f, squares = 0.f;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const float4 part = *reinterpret_cast<const float4*>(row + start + i);
    const float values[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float deviation = start + i + j < columns ? values[j] - shift : 0.f;
      sum += deviation;
      squares = fmaf(deviation, deviation, squares);
    }
  }
  sum += __shfl_xor_sync(kWarp, sum, 1);
  squares += __shfl_xor_sync(kWarp, squares, 1);
  const float mean = sum / columns;
  return make_float2(shift + mean, fmaf(-sum, mean, squares));
}

// 16 positions of one channel, `row` elements apart; zero past `valid`. Addresses are counted up: as multiples of the
// row the compiler would keep them all in registers.
template <typename T>
__device__ __forceinline__ void load_rows(const T* from, int row, int valid, T (&values)[kChunk]) {
  if (valid == kChunk) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i, from += row)
      values[i] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i, from += row)
      values[i] = i < valid ? *from : static_cast<T>(0.f);
  }
}

// Writes one position after the other, forward or backward.
template <typename T, bool kReverse = false>
struct RowWriter {
  T* to;
  const int row, valid;

  __device__ __forceinline__ RowWriter(T* first, int row_, int valid_)
      : to(kReverse ? first + (kChunk - 1) * row_ : first), row(row_), valid(valid_) {}

  // Position i, in order.
  __device__ __forceinline__ void put(int i, float value) {
    if (i < valid)
      *to = static_cast<T>(value);
    kReverse ? to -= row : to += row;
  }
};

}  // namespace mobilemamba
