// Two channels a lane: what the kernels for 16-bit sequences of the released networks' widths are made of.
//
// The width D is known at compile time, and with it the rank of the time step, D / 32. A warp has 64 channels, the last
// one of a block 32 where D leaves no more: its upper lanes then repeat what the lower ones do. A tile holds 16
// positions, of which a chunk has as many or fewer: as [8][kPairedRow] floats, two positions of two channels side by
// side, or as [16][kWideRow], rows being positions.
#pragma once

#include "scan/cuda/chunks.h"
#include "scan/cuda/inputs.cuh"
#include "scan/cuda/pairs.cuh"

namespace mobilemamba {

// More than the values of a row: neither rows nor columns of fragments fall on the same bank.
constexpr int kPairedRow = 2 * 64 + 16;
constexpr int kWideRow = 64 + 8;

template <typename T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
  return {load_word(from)};
}

template <int kD>
struct Width {
  static constexpr int kRank = kD / 32;
  static constexpr int kColumns = kRank + 2;  // of the projection, for a direction
  static constexpr int kBlocks = (kRank + 7) / 8;
  static constexpr int kGroups = (kD + 63) / 64;
  static constexpr bool kHasHalf = kD % 64 != 0;
  // dt_bias is added by the product where the rank leaves room for two more rows: its leading bits, and the rest.
  static constexpr bool kHasBiasRows = 8 * kBlocks - kRank >= 2;

  // In floats. Fragments of the weights: [direction][group][4][kBlocks][lane] of four.
  static constexpr int kWeights = 2 * kGroups * kBlocks * 512;
  // Fragments of dt, [kBlocks][lane] of four; then B and C, [16] of two.
  static constexpr int kStageDirection = kBlocks * 128 + 2 * kMaxChunk;
  static constexpr int kStage = 2 * kStageDirection;
  static constexpr int kTile = kMaxChunk * kWideRow;
  static constexpr int kParameters = kHasBiasRows ? 5 : 7;
};

// dt_weight and, where there is room, dt_bias, times log2(e), as fragments of the product; by the block.
template <int kD>
__device__ __forceinline__ void put_weight_fragments(const float* dt_weight, const float* dt_bias, float* weights) {
  using W = Width<kD>;
  for (int item = threadIdx.x; item < W::kWeights; item += blockDim.x) {
    // The order of a fragment's four: rows q and q + 4 for channel g of a block of 8, and of the next one.
    const int i = item % 4, lane = item / 4 % kLanes, rest = item / (4 * kLanes);
    const int k = rest % W::kBlocks, j = rest / W::kBlocks % 4 * 2 + i / 2, group = rest / (4 * W::kBlocks);
    const int direction = group / W::kGroups, r = 8 * k + lane % 4 + i % 2 * 4;
    const int d = direction * kD + min(group % W::kGroups * 64 + 8 * j + lane / 4, kD - 1);
    float value = 0.f;
    if (r < W::kRank)
      value = round_tf32(kLog2e * dt_weight[d * W::kRank + r]);
    else if (W::kHasBiasRows && r < W::kRank + 2) {
      const float bias = kLog2e * dt_bias[d], leading = round_tf32(bias);
      value = r == W::kRank ? leading : round_tf32(bias - leading);
    }
    weights[item] = value;
  }
}

// Where one of a position's values for the product goes in the fragments of dt: a fragment's rows q and q + 8 are
// positions 2q and 2q + 1, so that a lane receives the products of both.
__device__ __forceinline__ int dt_offset(int position, int own) {
  const int lane = position / 2 * 4 + own % 4;
  return (own / 8 * kLanes + lane) * 4 + position % 2 + own % 8 / 4 * 2;
}

// Where a column of the projection goes in the stage of a chunk.
template <int kD>
__device__ __forceinline__ int stage_offset(int position, int column) {
  using W = Width<kD>;
  const int direction = column >= W::kColumns, own = column - direction * W::kColumns;
  const int start = direction * W::kStageDirection;
  if (own >= W::kRank)
    return start + W::kBlocks * 128 + 2 * position + own - W::kRank;
  return start + dt_offset(position, own);
}

// What a stage holds beside the projection; by `threads` threads.
template <int kD>
__device__ __forceinline__ void clear_stage(float* stage, int thread, int threads) {
  using W = Width<kD>;
  for (int item = thread; item < W::kStage; item += threads)
    stage[item] = 0.f;
  __syncthreads();
  if (W::kHasBiasRows)
    for (int item = thread; item < 2 * kMaxChunk * 2; item += threads) {
      const int own = W::kRank + item % 2, position = item / 2 % kMaxChunk, direction = item / (2 * kMaxChunk);
      stage[direction * W::kStageDirection + dt_offset(position, own)] = 1.f;
    }
}

// The projection of a chunk on its way from global memory into a stage, by the warps of `kD` channels. Where its pairs
// of values go stands in a table in shared memory, which spares registers.
template <typename T, int kD, int kC>
struct Projection {
  using W = Width<kD>;
  static constexpr int kThreads = W::kGroups * kLanes;
  static constexpr int kPairs = kC * W::kColumns;
  static constexpr int kItems = (kPairs + kThreads - 1) / kThreads;
  Pair<T> pairs[kItems];

  // The places of both values of each pair in bytes, 16 bits each.
  static __device__ __forceinline__ void put_places(uint32_t* places) {
    static_assert(sizeof(float) * W::kStage <= 0x10000);
    const auto place = [](int position, int column) -> uint32_t {
      return sizeof(float) * stage_offset<kD>(position, column);
    };
    for (int item = threadIdx.x; item < kPairs; item += blockDim.x) {
      const int position = item / W::kColumns, column = item % W::kColumns * 2;
      places[item] = place(position, column) | place(position, column + 1) << 16;
    }
  }

  // `from` is the thread's first pair.
  __device__ __forceinline__ void fetch(const T* from, int valid, int thread) {
#pragma unroll
    for (int n = 0; n < kItems; ++n)
      pairs[n] = thread + n * kThreads < valid * W::kColumns ? load_pair(from + 2 * n * kThreads) : Pair<T>{0u};
  }

  __device__ __forceinline__ void put(float* stage, const uint32_t* places, int thread) const {
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int item = thread + n * kThreads;
      if (item >= kPairs)
        return;
      const uint32_t place = places[item];
      const float2 values = unpack(pairs[n]);
      *reinterpret_cast<float*>(reinterpret_cast<char*>(stage) + (place & 0xffffu)) = values.x;
      *reinterpret_cast<float*>(reinterpret_cast<char*>(stage) + (place >> 16)) = values.y;
    }
  }
};

// tile (paired) = staged dt (16, R) . dt_weight^T (R, 64), times log2(e); complete after a __syncwarp. All values have
// been rounded to TF32, or are 16-bit values, which it holds.
template <int kD>
__device__ __forceinline__ void project_pairs(const float4* dt, const float4* weights, float* tile) {
  using W = Width<kD>;
  const int lane = lane_index();
  float c[8][4] = {};
#pragma unroll
  for (int k = 0; k < W::kBlocks; ++k) {
    const float4 own = dt[k * kLanes + lane];
    const float a[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 weight = weights[(j * W::kBlocks + k) * kLanes + lane];
      const float first[2] = {weight.x, weight.y}, second[2] = {weight.z, weight.w};
      multiply_tf32(c[2 * j], a, first);
      multiply_tf32(c[2 * j + 1], a, second);
    }
  }
  float4* const to = reinterpret_cast<float4*>(tile + lane / 4 * kPairedRow) + lane % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    to[4 * j] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
}

// Parameters of two channels, which a lane reads from shared memory when it needs them.
// The bias only if the product does not add it.
enum PairParameter { kDecay0, kDecay1, kSkip, kNormWeight, kNormBias, kBias0, kBias1 };

// Mean, and squared deviations from it, of each row of a tile (wide), over 64 channels or over the first 32; lanes 2p
// and 2p + 1 receive those of position p.
__device__ __forceinline__ float2 pair_moments(const float* tile, bool is_half) {
  // Sums of squares lose what the mean's square takes, which is less than the values' own errors until the mean is
  // hundreds of deviations. Lanes of a pair read alternate fours: eight lanes fall on different banks.
  const float4* const row = reinterpret_cast<const float4*>(tile + lane_index() / 2 * kWideRow) + lane_index() % 2;
  float sum = 0.f, squares = 0.f;
  const auto add = [&](const float4& four) {
    sum += (four.x + four.y) + (four.z + four.w);
    squares = fmaf(four.x, four.x, fmaf(four.y, four.y, fmaf(four.z, four.z, fmaf(four.w, four.w, squares))));
  };
#pragma unroll
  for (int i = 0; i < 4; ++i)
    add(row[2 * i]);
  if (!is_half) {
#pragma unroll
    for (int i = 4; i < 8; ++i)
      add(row[2 * i]);
  }
  sum += __shfl_xor_sync(kWarp, sum, 1);
  squares += __shfl_xor_sync(kWarp, squares, 1);
  const float mean = sum * (is_half ? 1.f / 32.f : 1.f / 64.f);
  return make_float2(mean, fmaxf(fmaf(-sum, mean, squares), 0.f));
}

}  // namespace mobilemamba
