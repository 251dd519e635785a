// Before and after the gradients of the gated scan: parameters as a warp reads them, and the sums of the blocks'
// shares of the parameters' gradients.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "scan/cuda/pairs.cuh"
#include "scan/cuda/tile.cuh"

namespace mobilemamba {

constexpr int kGroup = 64;  // channels of a warp, two a lane
constexpr int kParameterThreads = 256;

// A vector of one of the floating-point types.
struct AnyFloats {
  enum Type { kFloat, kHalf, kBFloat16 };
  void* data;
  Type type;

  __device__ __forceinline__ float get(int64_t i) const {
    if (type == kHalf)
      return static_cast<float>(static_cast<const c10::Half*>(data)[i]);
    if (type == kBFloat16)
      return static_cast<float>(static_cast<const c10::BFloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
  __device__ __forceinline__ void put(int64_t i, float value) const {
    if (type == kHalf)
      static_cast<c10::Half*>(data)[i] = static_cast<c10::Half>(value);
    else if (type == kBFloat16)
      static_cast<c10::BFloat16*>(data)[i] = static_cast<c10::BFloat16>(value);
    else
      static_cast<float*>(data)[i] = value;
  }
};

// The parameters of a gated scan, or their gradients.
struct AnyParameters {
  AnyFloats dt_weight;               // (2, D, R)
  AnyFloats dt_bias, A_log, D_skip;  // (2, D)
  AnyFloats norm_weight, norm_bias;  // (D)
  int channels, rank;
};

// Where the parameters of a group of 64 channels begin, of one direction, then those of both. Weights and bias are
// times log2(e), in the order in which the lanes of the tensor cores take them, zero beyond the channels and the rank;
// where dt has a column of ones, the bias is a weight too.
template <int NR>
struct GroupLayout {
  static constexpr int kProject = 0;  // for dt . dt_weight^T: [NR][4][32][4]
  // For d(dt) = draw . dt_weight: [NR][4][32][4]; where the product is of 16-bit values, pairs of them, [NR][2][32][4].
  static constexpr int kTranspose = kProject + 512 * NR;
  static constexpr int kBias = kTranspose + 512 * NR;  // [4][32][4]
  static constexpr int kA = kBias + 512;               // -exp(A_log), [32][4], of which the first two
  static constexpr int kDirection = kA + 4 * kLanes;
  static constexpr int kSkip = 2 * kDirection;  // D_skip, both directions added, likewise
  static constexpr int kNormWeight = kSkip + 4 * kLanes;
  static constexpr int kNormBias = kNormWeight + 4 * kLanes;
  static constexpr int kFloats = kNormBias + 4 * kLanes;

  // Where a vector has the value of a channel. All that a lane reads lies at one distance from its own address.
  __device__ __forceinline__ static int place(int channel) { return channel / 2 * 4 + channel % 2; }
};

// Grid (groups), into (groups, kFloats).
template <typename T, int NR>
__global__ void prepare_kernel(const AnyParameters p, bool has_ones, float* prepared) {
  using Layout = GroupLayout<NR>;
  constexpr bool kExact = sizeof(T) == sizeof(float);
  float* const group = prepared + static_cast<int64_t>(blockIdx.x) * Layout::kFloats;
  const int first = blockIdx.x * kGroup;
  const auto weight = [&](int direction, int channel, int rank) {
    if (first + channel >= p.channels || rank > p.rank || (rank == p.rank && !has_ones))
      return 0.f;
    const int64_t row = static_cast<int64_t>(direction) * p.channels + first + channel;
    const float value = kLog2e * (rank == p.rank ? p.dt_bias.get(row) : p.dt_weight.get(row * p.rank + rank));
    return kExact ? value : round_tf32(value);
  };
  for (int direction = 0; direction < 2; ++direction) {
    float* const own = group + direction * Layout::kDirection;
    for (int item = threadIdx.x; item < 512 * NR; item += blockDim.x) {
      const int i = item % 4, lane = item / 4 % kLanes, pair = item / 128 % 4, block = item / 512;
      const int g = lane / 4, q = lane % 4 + i % 2 * 4, column = 8 * (2 * pair + i / 2);
      own[Layout::kProject + item] = weight(direction, column + g, 8 * block + q);
      if (kExact)
        own[Layout::kTranspose + item] = weight(direction, column + q, 8 * block + g);
    }
    if constexpr (!kExact)
      for (int item = threadIdx.x; item < 256 * NR; item += blockDim.x) {
        const int i = item % 4, lane = item / 4 % kLanes, pair = item / 128 % 2, rank = item / 256 * 8 + lane / 4;
        const int channel = 16 * (2 * pair + i / 2) + i % 2 * 8 + lane % 4 * 2;
        const float2 two = make_float2(weight(direction, channel, rank), weight(direction, channel + 1, rank));
        own[Layout::kTranspose + item] = __uint_as_float(pack<T>(two).bits);
      }
    for (int item = threadIdx.x; item < 512; item += blockDim.x) {
      const int i = item % 4, q = item / 4 % 4, pair = item / 128;
      const int channel = first + 8 * (2 * pair + i / 2) + 2 * q + i % 2;
      own[Layout::kBias + item] = channel < p.channels ? kLog2e * p.dt_bias.get(direction * p.channels + channel) : 0.f;
    }
    for (int item = threadIdx.x; item < kGroup; item += blockDim.x) {
      const bool exists = first + item < p.channels;
      own[Layout::kA + Layout::place(item)] = exists ? -expf(p.A_log.get(direction * p.channels + first + item)) : -1.f;
    }
  }
  for (int item = threadIdx.x; item < kGroup; item += blockDim.x) {
    const int channel = first + item;
    const bool exists = channel < p.channels;
    group[Layout::kSkip + Layout::place(item)] =
        exists ? p.D_skip.get(channel) + p.D_skip.get(p.channels + channel) : 0.f;
    group[Layout::kNormWeight + Layout::place(item)] = exists ? p.norm_weight.get(channel) : 0.f;
    group[Layout::kNormBias + Layout::place(item)] = exists ? p.norm_bias.get(channel) : 0.f;
  }
}

// A thread block's share of the parameters' gradients: groups of 64 channels, and of each, the sums for dt_weight as
// lanes hold them, [2][4][NR][32][4], then vectors of 64: dt_bias and A_log of both directions, and the rest.
struct ShareLayout {
  int rank_blocks;
  bool has_ones;  // dt_bias then stands behind dt_weight's columns

  __host__ __device__ int vectors() const { return 1024 * rank_blocks; }
  __host__ __device__ int group() const { return vectors() + 7 * kGroup; }
  __host__ __device__ int weights(int direction) const { return direction * 512 * rank_blocks; }
  __host__ __device__ int dt_bias(int direction) const { return vectors() + direction * kGroup; }
  __host__ __device__ int A_log(int direction) const { return vectors() + (2 + direction) * kGroup; }
  __host__ __device__ int D_skip() const { return vectors() + 4 * kGroup; }
  __host__ __device__ int norm_weight() const { return vectors() + 5 * kGroup; }
  __host__ __device__ int norm_bias() const { return vectors() + 6 * kGroup; }
};

__device__ __forceinline__ void put_gradient(
    const AnyParameters& p, const ShareLayout& layout, int group, int place, float value) {
  if (place < layout.vectors()) {
    const int i = place % 4, lane = place / 4 % kLanes, tile = place / 128;
    const int block = tile % layout.rank_blocks, m = tile / layout.rank_blocks % 4;
    const int direction = tile / layout.rank_blocks / 4;
    const int channel = group * kGroup + 16 * m + lane / 4 + i / 2 * 8, rank = 8 * block + lane % 4 * 2 + i % 2;
    if (channel < p.channels && rank == p.rank && layout.has_ones)
      p.dt_bias.put(static_cast<int64_t>(direction) * p.channels + channel, value);
    else if (channel < p.channels && rank < p.rank)
      p.dt_weight.put((static_cast<int64_t>(direction) * p.channels + channel) * p.rank + rank, value);
    return;
  }
  const int vector = (place - layout.vectors()) / kGroup, channel = group * kGroup + place % kGroup;
  if (channel >= p.channels)
    return;
  if (vector < 2 && layout.has_ones)
    return;
  if (vector < 2)
    p.dt_bias.put(vector * p.channels + channel, value);
  else if (vector < 4)
    p.A_log.put((vector - 2) * p.channels + channel, value);
  else if (vector == 5)
    p.norm_weight.put(channel, value);
  else if (vector == 6)
    p.norm_bias.put(channel, value);
  else  // the same for both directions
    for (int direction = 0; direction < 2; ++direction)
      p.D_skip.put(direction * p.channels + channel, value);
}

// The sums over the blocks, always in the same order. Grid (sums of a group / 32, groups); a warp takes every 8th
// block.
__global__ void add_kernel(const float* shares, int blocks, ShareLayout layout, const AnyParameters gradients) {
  constexpr int kWarps = kParameterThreads / kLanes;
  const int place = blockIdx.x * kLanes + lane_index();
  const int64_t share = static_cast<int64_t>(gridDim.y) * layout.group();
  const float* const own = shares + static_cast<int64_t>(blockIdx.y) * layout.group() + place;
  float* const parts = shared_memory();
  float part = 0.f;
  for (int block = threadIdx.x / kLanes; block < blocks; block += kWarps)
    part += own[block * share];
  parts[threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.x >= kLanes)
    return;
  float total = 0.f;
  for (int warp = 0; warp < kWarps; ++warp)
    total += parts[warp * kLanes + threadIdx.x];
  put_gradient(gradients, layout, blockIdx.y, place, total);
}

}  // namespace mobilemamba
