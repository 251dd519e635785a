// The gated scan of 16-bit sequences of the released networks' widths: x, z and y go through memory once.
//
// A cluster of blocks has an image, a block some of its chunks with all channels. Each warp runs both directions
// through a chunk as if no state entered it, and keeps the sum and, for each direction, C times the decay since the
// chunk's start. A chunk maps the state that enters it to decay * state + added: from these maps, composed in the block
// and exchanged in the cluster, follows the state that does enter, and its share of the sum is added. Then the block,
// which has all channels, normalises and gates. States and sums are in units of ln 2, which the normalisation takes
// out.
//
// Blocks stay, and take one image after the other. Chunks of 13 positions may end with some that do not exist; all
// others are full, or, behind the last one of an image, empty.
#pragma once

#include "scan/cuda/fragments.cuh"

namespace mobilemamba {

// How a block for D channels is divided.
template <int kD>
struct ClusterShape {
  // Chunks of a block at a time: as many warps as there are registers for.
  static constexpr int kSlots = Width<kD>::kGroups <= 6 ? 2 : 1;
  static constexpr int kWarps = kSlots * Width<kD>::kGroups;
  static constexpr int kSlotThreads = Width<kD>::kGroups * kLanes;
  static constexpr int kThreads = kWarps * kLanes;
};

struct ClusterPlan {
  int blocks;         // of a cluster
  int chunks_a_slot;  // one after the other
  int states;         // kept for a direction
};

// Where the parts of a block's shared memory begin, in floats.
template <int kD, int kC>
struct ClusterLayout {
  using W = Width<kD>;
  using Shape = ClusterShape<kD>;
  static constexpr int kPlaces = W::kWeights;
  static constexpr int kParameters = kPlaces + (kC * W::kColumns + 3) / 4 * 4;    // [which][group][lane] of two
  static constexpr int kStages = kParameters + W::kParameters * W::kGroups * 64;  // [slot]
  static constexpr int kWarps = kStages + Shape::kSlots * W::kStage;              // [slot][group]
  static constexpr int kMoments = kWarps + Shape::kWarps * (W::kTile + kC * kLanes);
  static constexpr int kBlockMaps = kMoments + 2 * Shape::kWarps * kMaxChunk * 2;  // [direction][group][lane]
  static constexpr int kMaps = kBlockMaps + 2 * W::kGroups * kLanes * 4;           // [direction][chunk][group][lane]
  // In the part of a warp, after its tile: x.
  static constexpr int kX = W::kTile, kWarp = kX + kC * kLanes;

  __host__ __device__ static constexpr int parked(int chunks_a_slot) {
    return kMaps + 2 * Shape::kSlots * chunks_a_slot * W::kGroups * kLanes * 4;
  }
  __host__ __device__ static constexpr int floats(int chunks_a_slot) {
    return parked(chunks_a_slot) + (chunks_a_slot - 1) * Shape::kWarps * kC * kLanes * 4;
  }
};

// kZRow: elements between the rows of z. kIsWhole: a chunk is a whole image.
template <typename T, int kD, int kC, int kZRow, bool kIsWhole>
struct ClusterWarp {
  using W = Width<kD>;
  using Shape = ClusterShape<kD>;
  using Staged = Projection<T, kD, kC>;
  using Layout = ClusterLayout<kD, kC>;
  static constexpr int kSlots = Shape::kSlots;
  static constexpr bool kMayEndEarly = kC == kPartialChunk;
  // Of three chunks in four places, one in four is empty. Elsewhere few are, and a branch costs more than their loads.
  static constexpr bool kSkipsEmpty = kC == 12 && kSlots == 2;

  const ScanInputs<T>& p;
  const NormInputs<T>& norm;
  const ClusterPlan& plan;
  T* const y;
  const Kept& kept;

  const int lane = lane_index(), warp = warp_index();
  const int slot = warp / W::kGroups, group = warp % W::kGroups;
  // Where there is one slot, from a number that can be read again: registers are few.
  const int slot_thread = kSlots == 1 ? threadIdx.x - slot * Shape::kSlotThreads : group * kLanes + lane;
  const bool is_half = W::kHasHalf && group == W::kGroups - 1;
  const int column = 2 * (is_half ? lane % 16 : lane), channel = 64 * group + column;
  const int rank = blockIdx.x;
  const int block_chunks = kSlots * plan.chunks_a_slot;

  float* const memory = shared_memory();
  float* const stage = memory + Layout::kStages + slot * W::kStage;
  float* const tile = memory + Layout::kWarps + warp * Layout::kWarp;

  Staged projection;
  float2 sum[kC];
  Pair<T> factors[2][kC];  // C times the decay since the chunk's start

  __device__ __forceinline__ uint32_t* places() const { return reinterpret_cast<uint32_t*>(memory + Layout::kPlaces); }
  __device__ __forceinline__ T* x() const { return reinterpret_cast<T*>(tile + Layout::kX); }
  // What normalises a position, in the tile.
  __device__ __forceinline__ float2* norms() const { return reinterpret_cast<float2*>(tile); }

  // The n-th chunk of the slot: within the block, and within the image.
  __device__ __forceinline__ int chunk_in_block(int n) const { return slot * plan.chunks_a_slot + n; }
  __device__ __forceinline__ int chunk_of(int n) const {
    return kIsWhole ? 0 : rank * block_chunks + chunk_in_block(n);
  }
  __device__ __forceinline__ bool is_empty(int n) const { return !kIsWhole && chunk_of(n) * kC >= p.length; }
  __device__ __forceinline__ int valid(int n) const {
    return kMayEndEarly ? max(0, min(kC, p.length - chunk_of(n) * kC)) : is_empty(n) ? 0 : kC;
  }
  __device__ __forceinline__ int row_of(int image, int n) const { return image * p.length + chunk_of(n) * kC; }
  // One that exists: what an empty chunk, which is without x, loads from it means nothing.
  __device__ __forceinline__ int readable_row_of(int image, int n) const {
    return is_empty(n) ? image * p.length : row_of(image, n);
  }
  // A place in one of the rows, which have fewer than 2^32 values together.
  template <int kRow, typename Value>
  __device__ __forceinline__ static Value* at(Value* first, int row, int place) {
    return first + (static_cast<uint32_t>(row) * kRow + place);
  }

  // Start to load the inputs of the slot's n-th chunk: x to shared memory, 16 bytes a lane.
  __device__ __forceinline__ void fetch(int image, int n) {
    const int row = readable_row_of(image, n), count = valid(n);
    projection.fetch(at<2 * W::kColumns>(p.projection, row, 2 * slot_thread), kMayEndEarly ? count : kC, slot_thread);
    const int first = lane / 8, part = lane % 8 * 8;
    if (is_half && part >= 32)
      return;
    const T* const from = at<kD>(p.x, row + first, 64 * group + part);
    float4* const to = reinterpret_cast<float4*>(x() + first * 64 + part);
#pragma unroll
    for (int i = 0; i < kC; i += 4)
      if (i + 4 <= kC || i + first < kC)
        copy_ahead(to + i * 8, from + i * kD, kMayEndEarly ? i + first < count : count > 0);
  }

  // Own channels of a direction's parameters.
  __device__ __forceinline__ float2 pair_at(const float* values, int direction) const {
    return make_float2(values[direction * kD + channel], values[direction * kD + channel + 1]);
  }
  __device__ __forceinline__ float2& parameter(int which) const {
    return reinterpret_cast<float2*>(memory + Layout::kParameters)[(which * W::kGroups + group) * kLanes + lane];
  }

  // What a direction needs of them.
  struct Own {
    float2 A, bias, skip;
  };

  // One position: the state, its share of the sum, and the factor of the state that enters the chunk.
  template <int kDirection>
  __device__ __forceinline__ void take(
      int i, float2 w, float B, float C, float2 own_x, const Own& own, float2& state, float2& decay) {
    const float2 raw = W::kHasBiasRows ? w : w + own.bias;
    const float2 s = make_float2(softplus2_of<T>(raw.x), softplus2_of<T>(raw.y));
    const float2 a = make_float2(decay_of(s.x, own.A.x), decay_of(s.y, own.A.y));
    state = make_float2(next_state(state.x, s.x, a.x, B, own_x.x), next_state(state.y, s.y, a.y, B, own_x.y));
    sum[i] = kDirection ? state * C : multiply_add(own.skip, own_x, multiply_add(state, C, sum[i]));
    if (!kIsWhole) {
      decay = decay * a;
      factors[kDirection][i] = pack<T>(decay * C);
    }
  }

  // Run a direction through the slot's n-th chunk.
  template <int kDirection>
  __device__ __forceinline__ void scan(int n, const Pair<T> (&own_x)[kC]) {
    const float* const own_stage = stage + kDirection * W::kStageDirection;
    const float4* const fragments =
        reinterpret_cast<const float4*>(memory) + (kDirection * W::kGroups + group) * 4 * W::kBlocks * kLanes;
    __syncwarp();
    project_pairs<kD>(reinterpret_cast<const float4*>(own_stage), fragments, tile);
    __syncwarp();
    const float4* const all_w = reinterpret_cast<const float4*>(tile + 2 * column);
    const float4* const all_BC = reinterpret_cast<const float4*>(own_stage + W::kBlocks * 128);
    Own own{parameter(kDecay0 + kDirection)};
    if (!W::kHasBiasRows)
      own.bias = parameter(kBias0 + kDirection);
    if (kDirection == 0)
      own.skip = parameter(kSkip);
    float2 state = make_float2(0.f, 0.f), decay = make_float2(1.f, 1.f);
#pragma unroll
    for (int step = 0; step < (kC + 1) / 2; ++step) {
      const int pair = kDirection ? (kC - 1) / 2 - step : step;
      const float4 w = all_w[pair * (kPairedRow / 4)], BC = all_BC[pair];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int odd = kDirection ? 1 - half : half, i = 2 * pair + odd;
        if (i < kC)
          take<kDirection>(
              i, odd ? make_float2(w.z, w.w) : make_float2(w.x, w.y), odd ? BC.z : BC.x, odd ? BC.w : BC.y,
              unpack(own_x[i]), own, state, decay);
      }
    }
    if (!kIsWhole)
      *map_of(kDirection, chunk_in_block(n)) = make_float4(decay.x, state.x, decay.y, state.y);
  }

  __device__ __forceinline__ float4* map_of(int direction, int chunk) const {
    return reinterpret_cast<float4*>(memory + Layout::kMaps) +
           ((direction * block_chunks + chunk) * W::kGroups + group) * kLanes + lane;
  }

  // Both directions through the slot's n-th chunk, whose inputs have been fetched.
  __device__ __forceinline__ void scan_chunk_alone(int n) {
    if (n > 0)
      __syncthreads();  // the stage has been read; between images all threads have met
    projection.put(stage, places(), slot_thread);
    wait_for_copies();
    __syncthreads();
    Pair<T> own_x[kC];
#pragma unroll
    for (int i = 0; i < kC; ++i)
      own_x[i] = as_pairs(x() + i * 64)[column / 2];
    scan<1>(n, own_x);
    // Direction 1's factors wait where x was: registers are few.
    if (!kIsWhole)
      put_factors_aside();
    scan<0>(n, own_x);
    if (!kIsWhole)
      get_factors_back();
    __syncwarp();
  }

  // All but the last kC % 4 of them.
  __device__ __forceinline__ float4* factors_aside() const { return reinterpret_cast<float4*>(x()) + lane; }
  __device__ __forceinline__ void put_factors_aside() const {
    const auto word = [&](int i) { return __uint_as_float(factors[1][i].bits); };
#pragma unroll
    for (int i = 0; i < kC / 4 * 4; i += 4)
      factors_aside()[i / 4 * kLanes] = make_float4(word(i), word(i + 1), word(i + 2), word(i + 3));
  }
  __device__ __forceinline__ void get_factors_back() {
#pragma unroll
    for (int i = 0; i < kC / 4 * 4; i += 4) {
      const float4 four = factors_aside()[i / 4 * kLanes];
      factors[1][i].bits = __float_as_uint(four.x);
      factors[1][i + 1].bits = __float_as_uint(four.y);
      factors[1][i + 2].bits = __float_as_uint(four.z);
      factors[1][i + 3].bits = __float_as_uint(four.w);
    }
  }

  __device__ __forceinline__ float4* parked_at(int n) const {
    return reinterpret_cast<float4*>(memory + Layout::parked(plan.chunks_a_slot)) +
           ((n * kSlots + slot) * W::kGroups + group) * kC * kLanes + lane;
  }
  __device__ __forceinline__ void park(int n) const {
    float4* const to = parked_at(n);
#pragma unroll
    for (int i = 0; i < kC; ++i)
      to[i * kLanes] =
          make_float4(sum[i].x, sum[i].y, __uint_as_float(factors[0][i].bits), __uint_as_float(factors[1][i].bits));
  }
  __device__ __forceinline__ void take_back(int n) {
    const float4* const from = parked_at(n);
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      const float4 own = from[i * kLanes];
      sum[i] = make_float2(own.x, own.y);
      factors[0][i].bits = __float_as_uint(own.z);
      factors[1][i].bits = __float_as_uint(own.w);
    }
  }

  // A map of two channels: decay, added, decay, added.
  static __device__ __forceinline__ void apply(const float4& map, float2& value) {
    value.x = fmaf(map.x, value.x, map.y);
    value.y = fmaf(map.z, value.y, map.w);
  }

  __device__ __forceinline__ float4* block_map_of(int direction) const {
    return reinterpret_cast<float4*>(memory + Layout::kBlockMaps) + (direction * W::kGroups + group) * kLanes + lane;
  }

  // The chunks of the block in a direction's travel: the map of the first, and the distance to the next.
  __device__ __forceinline__ float4* first_map(int direction) const {
    return map_of(direction, direction ? block_chunks - 1 : 0);
  }
  __device__ __forceinline__ static int next_map(int direction) { return (direction ? -1 : 1) * W::kGroups * kLanes; }

  // The map of all the block's chunks, one after the other in travel.
  __device__ __forceinline__ float4 compose(int direction) const {
    float2 decay = make_float2(1.f, 1.f), added = make_float2(0.f, 0.f);
    const float4* place = first_map(direction);
#pragma unroll 1
    for (int step = 0; step < block_chunks; ++step, place += next_map(direction)) {
      const float4 map = *place;
      apply(map, added);
      decay.x *= map.x;
      decay.y *= map.z;
    }
    return make_float4(decay.x, added.x, decay.y, added.y);
  }

  // The state that enters the block in a direction.
  __device__ __forceinline__ float2 state_before_block(int direction) const {
    constexpr int kAtATime = 4;  // which arrive together
    const int count = direction ? plan.blocks - 1 - rank : rank, sign = direction ? -1 : 1;
    const float4* const own = block_map_of(direction);
    float2 state = make_float2(0.f, 0.f);
    int other = direction ? plan.blocks - 1 : 0;
#pragma unroll 1
    for (int step = 0; step < count; step += kAtATime) {
      float4 maps[kAtATime];
#pragma unroll
      for (int i = 0; i < kAtATime; ++i, other += sign)
        if (step + i < count)
          maps[i] = read_of_block(own, other);
#pragma unroll
      for (int i = 0; i < kAtATime; ++i)
        if (step + i < count)
          apply(maps[i], state);
    }
    return state;
  }

  // Put the state that enters each chunk in the place of its map. Each slot's warps take a direction, or both where
  // there is one slot.
  __device__ __forceinline__ void exchange(bool is_first) {
    constexpr int kDirections = 2 / kSlots;
    __syncthreads();
    if (plan.blocks > 1) {
      if (!is_first)
        cluster_wait();  // the others have read the maps of the image before
#pragma unroll 1
      for (int i = 0; i < kDirections; ++i)
        *block_map_of(slot + i) = compose(slot + i);
      cluster_arrive();
      cluster_wait();
    }
#pragma unroll 1
    for (int i = 0; i < kDirections; ++i) {
      const int direction = slot + i;
      float2 state = state_before_block(direction);
      float4* place = first_map(direction);
#pragma unroll 1
      for (int step = 0; step < block_chunks; ++step, place += next_map(direction)) {
        const float4 map = *place;
        *reinterpret_cast<float2*>(place) = state;
        apply(map, state);
      }
    }
    if (plan.blocks > 1)
      cluster_arrive_from_reading();
    __syncthreads();
  }

  // The state that enters the slot's n-th chunk.
  __device__ __forceinline__ float2 state_before(int direction, int n) const {
    return *reinterpret_cast<const float2*>(map_of(direction, chunk_in_block(n)));
  }

  __device__ __forceinline__ bool is_own_channel() const { return !W::kHasHalf || !is_half || lane < 16; }

  __device__ __forceinline__ void keep_state(int image, int direction, int chunk, const float2& state) const {
    float* const to = at<kD>(kept.states, (2 * image + direction) * plan.states + chunk, channel);
    if (is_own_channel())
      store_value(reinterpret_cast<float2*>(to), state * kLn2);
  }

  // Add what the entering states contribute.
  __device__ __forceinline__ void correct(int image, int n) {
    const float2 first = state_before(0, n), second = state_before(1, n);
    if (kept.states && !is_empty(n)) {
      keep_state(image, 0, chunk_of(n), first);
      keep_state(image, 1, chunk_of(n), second);
    }
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      // Two channels at a time, rounded as the factors are.
      const Pair<T> own_first = pack<T>(first), own_second = pack<T>(second);
#pragma unroll
      for (int i = 0; i < kC; ++i)
        sum[i] = sum[i] + unpack(multiply_add(factors[0][i], own_first, factors[1][i] * own_second));
    } else {
#pragma unroll
      for (int i = 0; i < kC; ++i)
        sum[i] = multiply_add(unpack(factors[0][i]), first, multiply_add(unpack(factors[1][i]), second, sum[i]));
    }
  }

  // 1 / deviation and -mean / deviation over all channels, for each position, to norms().
  __device__ __forceinline__ void find_norm(int image, int n) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kC; ++i)
      *reinterpret_cast<float2*>(tile + i * kWideRow + column) = sum[i];
    __syncwarp();
    const float2 own = pair_moments(tile, is_half);
    float2* const moments =
        reinterpret_cast<float2*>(memory + Layout::kMoments) + (n % 2 * kSlots + slot) * W::kGroups * kMaxChunk;
    if (lane % 2 == 0)
      moments[group * kMaxChunk + lane / 2] = own;
    __syncthreads();
    const float2* const position = moments + lane % kMaxChunk;
    float mean = 0.f, squares = 0.f;
#pragma unroll
    for (int g = 0; g < W::kGroups; ++g)
      mean = fmaf(share(g), position[g * kMaxChunk].x, mean);
#pragma unroll
    for (int g = 0; g < W::kGroups; ++g) {
      const float2 part = position[g * kMaxChunk];
      const float deviation = part.x - mean;
      squares += fmaf(deviation * (kD * share(g)), deviation, part.y);
    }
    const float rstd = rsqrtf(fmaf(squares, 1.f / kD, kLog2e * kLog2e * norm.eps));
    if (lane < kMaxChunk)
      norms()[lane] = make_float2(rstd, -mean * rstd);
    if (kept.statistics && slot_thread < valid(n))
      store_value(kept.statistics + row_of(image, n) + slot_thread, make_float2(mean * kLn2, rstd * kLog2e));
    __syncwarp();
  }
  // A group's part of the channels.
  static __device__ __forceinline__ constexpr float share(int g) {
    return (W::kHasHalf && g == W::kGroups - 1 ? 32.f : 64.f) / kD;
  }

  __device__ __forceinline__ Pair<T> gated(int i, const Pair<T>& z, float2 factor, float2 weight, float2 bias) const {
    const float2 normed = make_float2(fmaf(sum[i].x, factor.x, factor.y), fmaf(sum[i].y, factor.x, factor.y));
    return pack<T>(multiply_add(normed, weight, bias) * silu(z));
  }

  __device__ __forceinline__ void store(int image, int n, const Pair<T> (&z)[kC]) const {
    if (is_empty(n))
      return;
    T* const to = at<kD>(y, row_of(image, n), channel);
    const float2 weight = parameter(kNormWeight), bias = parameter(kNormBias);
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      const float4 two = reinterpret_cast<const float4*>(norms())[i / 2];
      const Pair<T> pair = gated(i, z[i], i % 2 ? make_float2(two.z, two.w) : make_float2(two.x, two.y), weight, bias);
      if (is_own_channel() && (!kMayEndEarly || i < valid(n)))
        store_word(to + i * kD, pair.bits);
    }
  }

  __device__ __forceinline__ void load_gate(int image, int n, Pair<T> (&z)[kC]) const {
    if (kSkipsEmpty && is_empty(n))
      return;
    const T* const from = at<kZRow>(norm.z, readable_row_of(image, n), channel);
#pragma unroll
    for (int i = 0; i < kC; ++i)
      z[i] = !kMayEndEarly || i < valid(n) ? load_pair(from + i * kZRow) : Pair<T>{0u};
  }

  __device__ __forceinline__ void start() {
    put_weight_fragments<kD>(p.dt_weight, p.dt_bias, memory);
    Staged::put_places(places());
    clear_stage<kD>(stage, slot_thread, Shape::kSlotThreads);
    for (int direction = 0; direction < 2 && slot == 0; ++direction) {
      const float2 A_log = pair_at(p.A_log, direction);
      parameter(kDecay0 + direction) = make_float2(-expf(A_log.x), -expf(A_log.y));
      if (!W::kHasBiasRows)
        parameter(kBias0 + direction) = pair_at(p.dt_bias, direction) * kLog2e;
    }
    if (slot == 0) {
      parameter(kSkip) = (pair_at(p.D_skip, 0) + pair_at(p.D_skip, 1)) * kLog2e;
      parameter(kNormWeight) = pair_at(norm.weight, 0);
      parameter(kNormBias) = pair_at(norm.bias, 0);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    start();
    const int chunks = kIsWhole ? 1 : plan.chunks_a_slot;
    const int first = blockIdx.y, clusters = gridDim.y;
    fetch(first, 0);
    for (int image = first; image < p.batch; image += clusters) {
      // Loops that run at least once: what they write need not be kept from before.
      int n = 0;
      while (true) {
        scan_chunk_alone(n);
        if (n + 1 == chunks)
          break;
        fetch(image, n + 1);
        park(n++);
      }
      if (image + clusters < p.batch)
        fetch(image + clusters, 0);
      Pair<T> z[kC];
      load_gate(image, n, z);
      if (!kIsWhole)
        exchange(image == first);
      while (true) {
        if (!kIsWhole)
          correct(image, n);
        find_norm(image, n);
        store(image, n, z);
        if (n == 0)
          break;
        load_gate(image, --n, z);
        take_back(n);
      }
    }
    if (!kIsWhole && plan.blocks > 1)
      cluster_wait();  // before its shared memory goes, the others have read it
  }
};

// Grid (plan.blocks, clusters): a row is a cluster; as many as there is room for, or as there are images.
template <typename T, int kD, int kC, int kZRow, bool kIsWhole>
__global__ void __launch_bounds__(ClusterShape<kD>::kThreads, 1)
    cluster_kernel(const ScanInputs<T> p, const NormInputs<T> norm, const ClusterPlan plan, T* y, const Kept kept) {
  ClusterWarp<T, kD, kC, kZRow, kIsWhole> warp{p, norm, plan, y, kept};
  warp.run();
}

}  // namespace mobilemamba
