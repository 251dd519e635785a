// Gradients of the gated scan in one pass over its inputs.
//
// A block of threads has a block of positions, up to 4 chunks of an image (or 4 images of one chunk), with all its
// channels; a warp has 64 of them, two a lane. From the states that enter the chunks and the sums' statistics, kept by
// the forward pass, it
// 1. runs both directions through each chunk, normalises and gates: dz, and the gradient of the sum, which it parks; in
//    an image of several blocks also finds how the gradients of the states pass through the chunk, which go against the
//    directions' travel;
// 2. there finds, from how they pass through the other blocks, the gradients that enter this one;
// 3. computes the states of one chunk after the other again, from the last one to the first, and the gradients of
//    direction 1, then of direction 0. Those of direction 1's states go the other way: how they pass from the block's
//    entry to the chunk's has been found in step 1.
// Sums over channels are made in the block. Those over positions are made by each block for all images that it takes,
// and added up by add_kernel: in the same order every time, without atomics.
#pragma once

#include <type_traits>

#include "scan/cuda/chunks.h"
#include "scan/cuda/gated_scan_backward_parameters.cuh"
#include "scan/cuda/pairs.cuh"

namespace mobilemamba {

constexpr int kBlockChunks = 4;
constexpr int kMaxBackwardWarps = 9;
constexpr int kPairRow = 72;   // floats of a tile's row, two a lane
constexpr int kTileRows = 16;  // as the tensor cores take them

// What a launch does: all of it; or step 1, and all again in the next launch, which then finds the passages of step 1.
enum class Part { kWhole, kPassages, kGradients };

// How the gradient of the state passes through a block: the value that leaves is decay * the one that enters + added.
struct alignas(16) PassagePair {
  float2 decay, added;
};

// Sequences are (B * L) rows of D, strides in elements.
template <typename T>
struct BackwardArguments {
  const T *x, *z, *grad;
  int x_row, z_row, grad_row;
  const T* projection;       // (B, L, 2 * (R + 2))
  const float* prepared;     // (groups, GroupLayout::kFloats)
  const float* states;       // (B, 2, image_states, D)
  const float2* statistics;  // (B, L): mean over the channels and 1 / deviation of the sums
  T *dx, *dz;                // (B, L, D)
  T* dprojection;            // as projection
  float* shares;             // (thread blocks, groups, ShareLayout::group())
  PassagePair* passages;     // (B, 2, blocks, groups * 32)
  float* parked;             // (thread blocks, warps, parked floats) or, to use shared memory, null; known channels do
  int batch, length, channels, rank;
  int step;              // positions of a chunk
  int blocks;            // of an image
  int image_states;      // of a direction: one a chunk, or none where a chunk is an image
  bool are_independent;  // chunks: each is an image
  int items;             // blocks of positions, of all images
  Part part;
};

// Values of a chunk that a lane puts away for itself, as they are or with a scale. Returns what undoes the scale.
template <typename T>
struct Parking {
  using Type = T;
  using Stored = Pair<T>;
  static constexpr bool kScales = false;

  template <int kChunk>
  __device__ __forceinline__ static float scale_up(float2 (&)[kChunk]) {
    return 1.f;
  }
};

// In half precision: each lane's values of a chunk times a power of two that makes the most of its range.
template <>
struct Parking<c10::Half> {
  using Type = c10::Half;
  using Stored = Pair<c10::Half>;
  static constexpr bool kScales = true;

  template <int kChunk>
  __device__ __forceinline__ static float scale_up(float2 (&values)[kChunk]) {
    float most = 1e-30f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      most = fmaxf(fmaxf(most, fabsf(values[i].x)), fabsf(values[i].y));
    // The largest value comes to lie between 2^14 and 2^15.
    const uint32_t exponent = min(__float_as_uint(most) & 0x7f800000u, 240u << 23);
    const float up = __uint_as_float((268u << 23) - exponent);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      values[i] = values[i] * up;
    return __uint_as_float(exponent - (14u << 23));
  }
};

// Whether a block of threads has all positions of an image, in all the released networks with these channels.
__host__ __device__ constexpr bool is_block_an_image(int channels) {
  return channels == 384 || channels == 448 || channels == 544;
}

// The same for a chunk of so many positions.
__host__ __device__ constexpr bool is_chunk_an_image(int channels, int chunk) {
  return channels > 0 && chunk == 9;
}

// Where the parts of a thread block's shared memory begin, in floats. kHasPassages: an image may have several blocks.
template <typename T, int NR, int kChunk, bool kHasPassages>
struct BackwardShared {
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  static constexpr int kHeaderFloats = 4;  // the numbers of the block of positions and its image, its place in it
  static constexpr int kStageRows = (kBlockChunks - 1) * kChunk + kTileRows;
  static constexpr int kStageFloats = 2 * kStageRows * rank_row(NR);
  // Of a warp.
  static constexpr int kTileFloats = kTileRows * kPairRow;
  static constexpr int kNarrowFloats = kTileRows * kTileRow;
  static constexpr int kPassageFloats = (kHasPassages ? 2 : 1) * (kBlockChunks - 1) * kGroup;
  static constexpr int kLaneSumFloats = 2 * kGroup;
  static constexpr int kRowFloats = 4 * kTileRows;
  // A chunk's decays in half precision fit where the sums over lanes are made.
  static constexpr int kParkedChunks = kBlockChunks + kExact;
  // The sums for dt_weight of direction 1, where registers cannot hold those of both.
  static constexpr bool kParksSums = NR > 2;
  static constexpr int kSummedFloats = kParksSums ? 512 * NR : 0;
  static constexpr int kParkedFloats =
      kParkedChunks * kChunk * kGroup / (kExact ? 1 : 2) + kBlockChunks * kLanes + kSummedFloats;
  static constexpr int kWarpFloats = kTileFloats + kNarrowFloats + kPassageFloats + kLaneSumFloats + kRowFloats;
  static constexpr int kSumFloats = 2 * 2 * kTileRows;  // pairs, of two chunks

  static constexpr int floats(int warps, bool is_parked_here) {
    return kHeaderFloats + kStageFloats + warps * (kWarpFloats + kSumFloats + (is_parked_here ? kParkedFloats : 0));
  }
};

// Sum of pairs over the warps for position p, in lanes p and p + 16.
__device__ __forceinline__ float2 combine_group_sums(const float2* sums, int warps) {
  const int p = lane_index() % kTileRows, half = lane_index() / kTileRows;
  float2 total = make_float2(0.f, 0.f);
#pragma unroll
  for (int first = 0; first < warps; first += 2)
    if (first + half < warps)
      total = total + sums[(first + half) * kTileRows + p];
  total.x += __shfl_xor_sync(kWarp, total.x, kTileRows);
  total.y += __shfl_xor_sync(kWarp, total.y, kTileRows);
  return total;
}

// c += a b, where the tensor cores need not round: a is 16-bit or may lose its last bits, b is rounded.
template <bool kExact>
__device__ __forceinline__ void multiply_rounded(float (&c)[4], const float (&a)[4], float b0, float b1) {
  const float b[2] = {b0, b1};
  if constexpr (kExact)
    multiply<true>(c, a, b);
  else
    multiply_tf32(c, a, b);
}

// kChannels: D where it is a constant, and the rows of x and the output's gradient lie D apart; otherwise 0.
template <typename T, int NR, int kChunk, int kChannels>
struct BackwardWarp {
  static constexpr bool kHasPassages = !is_block_an_image(kChannels);
  using Shared = BackwardShared<T, NR, kChunk, kHasPassages>;
  using Layout = GroupLayout<NR>;
  static constexpr bool kExact = Shared::kExact;
  static constexpr int kRow = rank_row(NR);
  // The released networks have a rank of D / 32.
  static constexpr int kRank = (kChannels + 31) / 32;
  // A column of ones beside dt: the bias is a weight then, and so is its gradient.
  static constexpr bool kHasOnes = kRank % 8 != 0;
  static constexpr bool kRough = std::is_same_v<T, c10::BFloat16>;
  static constexpr bool kParksHere = kChannels > 0;  // in shared memory: one known kind of address
  static constexpr bool kIsWhole = kChannels > 0 && kChannels % kGroup == 0;
  // bfloat16 would not do for sums and their gradients: other sums, in which they cancel, follow.
  using Parked = Parking<std::conditional_t<kExact, float, c10::Half>>;
  using Stored = typename Parked::Stored;
  // Whether step 1 finds how gradients of a direction's states pass through chunks.
  template <int kDirection>
  static constexpr bool kPasses = kDirection ? !is_chunk_an_image(kChannels, kChunk) : kHasPassages;
  // Known widths have chunks of one length.
  static constexpr bool kMayEndEarly = kChannels == 0 || kChunk == kPartialChunk;
  static constexpr float kMasked = -200.f;  // a time step of zero: such a position changes nothing

  const BackwardArguments<T>& p;
  const int channels = kChannels ? kChannels : p.channels, rank = kRank ? kRank : p.rank;
  const int x_row = kChannels ? kChannels : p.x_row, grad_row = kChannels ? kChannels : p.grad_row;
  const int warps = kChannels ? (kChannels + kGroup - 1) / kGroup : blockDim.x / kLanes, warp = threadIdx.x / kLanes,
            lane = lane_index(), g = lane / 4, q = lane % 4;
  const int channel = warp * kGroup + 2 * lane;
  const bool exists = kIsWhole || channel < channels;
  const int readable =
      kIsWhole ? channel : min(channel, channels - 2);  // lanes beyond the channels read another's, and write nothing

  float* const stages = shared_memory() + Shared::kHeaderFloats;
  float2* const all_sums = reinterpret_cast<float2*>(stages + Shared::kStageFloats);
  float* const tiles = stages + Shared::kStageFloats + warps * Shared::kSumFloats;
  float* const tile = tiles + warp * Shared::kWarpFloats;
  float* const narrow = tile + Shared::kTileFloats;
  float2* const passages = reinterpret_cast<float2*>(narrow + Shared::kNarrowFloats) + lane;
  float2* const lane_sums = reinterpret_cast<float2*>(narrow + Shared::kNarrowFloats + Shared::kPassageFloats) + lane;
  float2* const statistics =
      reinterpret_cast<float2*>(narrow + Shared::kNarrowFloats + Shared::kPassageFloats + Shared::kLaneSumFloats);
  float2* const means = statistics + kTileRows;
  float* const scales =
      (kParksHere || !p.parked ? tiles + warps * Shared::kWarpFloats
                               : p.parked + static_cast<int64_t>(blockIdx.x) * warps * Shared::kParkedFloats) +
      warp * Shared::kParkedFloats + lane;
  Stored* const parked = reinterpret_cast<Stored*>(scales - lane + kBlockChunks * kLanes) + lane;
  float4* const summed =
      reinterpret_cast<float4*>(scales - lane + Shared::kParkedFloats - Shared::kSummedFloats) + lane;
  const float* const own_parameters = p.prepared + warp * Layout::kFloats + 4 * lane;
  const ShareLayout layout{NR, kHasOnes};
  float* const share = p.shares + (static_cast<int64_t>(blockIdx.x) * warps + warp) * layout.group();

  // Of the block of positions: its first row of all (B * L), how many it has.
  int first_row, rows;

  // By direction, unless those of direction 1 are parked.
  float dweight[Shared::kParksSums ? 1 : 2][4][NR][4];
  float2 dbias[2], dnorm_weight, dnorm_bias;

  // The numbers of the block of positions and of its image, and its place in it. What is rarely read is kept in shared
  // memory: registers are few.
  __device__ __forceinline__ int& item() const { return reinterpret_cast<int*>(shared_memory())[0]; }
  __device__ __forceinline__ int& image() const { return reinterpret_cast<int*>(shared_memory())[1]; }
  __device__ __forceinline__ int& block() const { return reinterpret_cast<int*>(shared_memory())[2]; }
  __device__ __forceinline__ int step() const { return kChannels ? kChunk : p.step; }
  // Of at most 4: a sum takes fewer instructions than a division, and no register in between.
  __device__ __forceinline__ int chunks() const {
    return 1 + (rows > step()) + (rows > 2 * step()) + (rows > 3 * step());
  }
  __device__ __forceinline__ int valid(int chunk) const {
    return kMayEndEarly ? min(step(), rows - chunk * step()) : kChunk;
  }
  __device__ __forceinline__ int64_t row_of(int chunk) const {
    return static_cast<int64_t>(first_row) + chunk * step();
  }
  __device__ __forceinline__ const float* stage_of(int direction, int chunk) const {
    return stages + (direction * Shared::kStageRows + chunk * step()) * kRow;
  }
  __device__ __forceinline__ static float2 BC(const float* stage, int i) {
    return *reinterpret_cast<const float2*>(stage + i * kRow + 8 * NR);
  }
  __device__ __forceinline__ float2& cell(int i) const {
    return *reinterpret_cast<float2*>(tile + i * kPairRow + 2 * lane);
  }
  // Of the lane, at a place in the layout.
  __device__ __forceinline__ const float4* parameters(int place) const {
    return reinterpret_cast<const float4*>(own_parameters + place);
  }
  __device__ __forceinline__ float2 parameter(int place) const {
    return *reinterpret_cast<const float2*>(own_parameters + place);
  }
  // How the gradient of direction 1's state passes from the block's entry to a chunk's, of all but the first.
  __device__ __forceinline__ float2& added_before(int chunk) const { return passages[(chunk - 1) * kLanes]; }
  __device__ __forceinline__ float2& decay_before(int chunk) const {
    return passages[(kBlockChunks + chunk - 2) * kLanes];
  }
  // Of direction 1, when all sums have been normalised.
  template <int kDirection>
  __device__ __forceinline__ float2& dA() const {
    return kDirection ? statistics[lane] : lane_sums[0];
  }
  __device__ __forceinline__ float2& dskip() const { return lane_sums[kLanes]; }
  // The position that comes `step`-th in the direction's travel.
  template <int kDirection>
  __device__ __forceinline__ static int travelled(int step) {
    return kDirection ? kChunk - 1 - step : step;
  }

  __device__ __forceinline__ void load(const T* from, int row, int chunk, Pair<T> (&values)[kChunk]) const {
    const int count = valid(chunk);
    from += row_of(chunk) * row + readable;
    if (!kMayEndEarly || count == kChunk) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        values[i] = load_value(as_pairs(from + i * row));
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        values[i] = i < count ? load_value(as_pairs(from + i * row)) : pack<T>(make_float2(0.f, 0.f));
    }
  }

  __device__ __forceinline__ void store(T* to, int chunk, const Pair<T> (&values)[kChunk]) const {
    const int count = exists ? valid(chunk) : 0;
    to += row_of(chunk) * channels + readable;
    if (count == kChunk) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        store_value(as_pairs(to + i * channels), values[i]);
    } else if (kMayEndEarly) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < count)
          store_value(as_pairs(to + i * channels), values[i]);
    }
  }

  // Changes the values.
  __device__ __forceinline__ void park(int chunk, float2 (&values)[kChunk]) const {
    scales[chunk * kLanes] = Parked::scale_up(values);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      parked[(chunk * kChunk + i) * kLanes] = pack<typename Parked::Type>(values[i]);
  }
  template <typename Own>
  __device__ __forceinline__ static float scale_of(const float* own_scales, int chunk) {
    return Own::kScales ? own_scales[chunk * kLanes] : 1.f;
  }
  // To be multiplied by the chunk's scale.
  __device__ __forceinline__ float2 get_parked(int chunk, int i) const {
    return unpack(parked[(chunk * kChunk + i) * kLanes]);
  }

  // Add to the block's share; each address belongs to one lane.
  __device__ __forceinline__ void add_to_share(int place, float2 value) const {
    float2* const to = reinterpret_cast<float2*>(share + place) + lane;
    *to = *to + value;
  }

  // The projection of all positions of the block as [2][rows][dt, zeros up to 8 * NR, ln 2 * B, C].
  __device__ __forceinline__ void put_stages() {
    static_assert(8 * NR + 2 <= kLanes);  // two columns a lane: those left over repeat what others do
    const int columns = rank + 2, width = 2 * columns, column = min(2 * lane, width - 2);
    const auto place = [&](int any) {
      const int direction = any >= columns, own = any - direction * columns;
      return direction * Shared::kStageRows * kRow + (own < rank ? own : 8 * NR + own - rank);
    };
    const auto unit = [&](int any) { return any % columns == rank ? kLn2 : 1.f; };
    const float2 units = make_float2(unit(column), unit(column + 1));
    const T* from = p.projection + static_cast<int64_t>(first_row + warp) * width + column;
    float* const left = stages + warp * kRow + place(column);
    float* const right = stages + warp * kRow + place(column + 1);
#pragma unroll 4
    for (int row = warp, offset = 0; row < rows; row += warps, from += warps * width, offset += warps * kRow) {
      const float2 values = units * unpack(load_value(as_pairs(from)));
      left[offset] = values.x;
      right[offset] = values.y;
    }
  }

  // log2(e) * (dt_weight . dt + dt_bias) of a chunk into the tile; complete for the lane's own channels.
  template <int kDirection>
  __device__ __forceinline__ void project(int chunk) const {
    const float4* const weights = parameters(kDirection * Layout::kDirection + Layout::kProject);
    const float4* const biases = parameters(kDirection * Layout::kDirection + Layout::kBias);
    const float* const dt = stage_of(kDirection, chunk);
    float c[8][4] = {};
#pragma unroll
    for (int j = 0; j < 4 && !kHasOnes; ++j) {
      const float4 bias = biases[j * kLanes];
      c[2 * j][0] = c[2 * j][2] = bias.x;
      c[2 * j][1] = c[2 * j][3] = bias.y;
      c[2 * j + 1][0] = c[2 * j + 1][2] = bias.z;
      c[2 * j + 1][1] = c[2 * j + 1][3] = bias.w;
    }
#pragma unroll
    for (int k = 0; k < NR; ++k) {
      float a[4];
      load_fragment(a, dt + 8 * k, kRow);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 b = weights[(4 * k + j) * kLanes];
        multiply_rounded<kExact>(c[2 * j], a, b.x, b.y);
        multiply_rounded<kExact>(c[2 * j + 1], a, b.z, b.w);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float* const to = tile + g * kPairRow + 8 * j + 2 * q;
      *reinterpret_cast<float2*>(to) = make_float2(c[j][0], c[j][1]);
      *reinterpret_cast<float2*>(to + 8 * kPairRow) = make_float2(c[j][2], c[j][3]);
    }
    __syncwarp();
    for (int i = valid(chunk); i < kChunk; ++i)
      cell(i) = make_float2(kMasked, kMasked);
  }

  __device__ __forceinline__ float2 time_step(int i) const {
    const float2 raw = cell(i);
    return make_float2(softplus2_of<T>(raw.x), softplus2_of<T>(raw.y));
  }
  __device__ __forceinline__ static float2 decay(float2 value, float2 s, float2 A) {
    return make_float2(decayed<kExact>(value.x, s.x, A.x), decayed<kExact>(value.y, s.y, A.y));
  }
  __device__ __forceinline__ static float2 advance(float2 state, float2 s, float2 A, float B, float2 x) {
    return make_float2(advanced<kExact>(state.x, s.x, A.x, B, x.x), advanced<kExact>(state.y, s.y, A.y, B, x.y));
  }

  // Of a block of the same image, in (B, 2, blocks).
  __device__ __forceinline__ int64_t place_in_image(int direction, int block) const {
    return (static_cast<int64_t>(image()) * 2 + direction) * p.blocks + block;
  }

  // The state that enters a chunk in its travel.
  template <int kDirection>
  __device__ __forceinline__ float2 first_state(int chunk) const {
    if (p.image_states == 0)
      return make_float2(0.f, 0.f);
    const int own = (2 * image() + kDirection) * p.image_states + block() * kBlockChunks + chunk;
    return load_value(reinterpret_cast<const float2*>(p.states + static_cast<int64_t>(own) * channels + readable));
  }

  // Where a chunk's decays since the direction's entry wait for the gradient of the sum: direction 1's where that
  // will be parked.
  template <int kDirection>
  __device__ __forceinline__ Stored& decay_since_entry(int chunk, int i) const {
    if (kDirection == 0 && !kExact)
      return reinterpret_cast<Stored*>(narrow)[i * kLanes + lane];
    return parked[((kDirection ? chunk : kBlockChunks) * kChunk + i) * kLanes];
  }

  // Add a direction's C * state at the positions of a chunk; returns the decay through all of it.
  template <int kDirection>
  __device__ __forceinline__ float2 scan(int chunk, const Pair<T> (&x)[kChunk], float2 (&y)[kChunk]) const {
    float2 state = first_state<kDirection>(chunk), through = make_float2(1.f, 1.f);
    project<kDirection>(chunk);
    const float2 A = parameter(kDirection * Layout::kDirection + Layout::kA);
    const float* const stage = stage_of(kDirection, chunk);
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = travelled<kDirection>(step);
      const float2 own_BC = BC(stage, i), s = time_step(i);
      state = advance(state, s, A, own_BC.x, unpack(x[i]));
      y[i] = multiply_add(state, own_BC.y, y[i]);
      if (kPasses<kDirection>) {
        through = decay(through, s, A);
        decay_since_entry<kDirection>(chunk, i) = pack<typename Parked::Type>(through);
      }
    }
    __syncwarp();
    return through;
  }

  // The sums of the chunk, in y, to their gradients; and dz.
  __device__ __forceinline__ void normalise_back(int chunk, float2 (&y)[kChunk]) {
    Pair<T> z[kChunk], grad[kChunk];
    load(p.z, p.z_row, chunk, z);
    load(p.grad, grad_row, chunk, grad);
    const float2 mean_rstd = load_value(p.statistics + row_of(chunk) + min(lane % kTileRows, valid(chunk) - 1));
    // Rows that are not there count for nothing.
    if (lane < kTileRows)
      statistics[lane] = lane < valid(chunk)
                             ? make_float2(kExact ? mean_rstd.x : -mean_rstd.x * mean_rstd.y, mean_rstd.y)
                             : make_float2(0.f, 0.f);
    __syncwarp();
    const float2 weight = parameter(Layout::kNormWeight), bias = parameter(Layout::kNormBias);
    float2 scaled[kChunk];  // gradient of the normalised value
    Pair<T> dz[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float2 own = statistics[i], z_own = unpack(z[i]), grad_own = unpack(grad[i]);
      const float2 normed = kExact ? make_float2((y[i].x - own.x) * own.y, (y[i].y - own.x) * own.y)
                                   : make_float2(fmaf(y[i].x, own.y, own.x), fmaf(y[i].y, own.y, own.x));
      const float2 shifted = multiply_add(normed, weight, bias);
      const GateGradient left = gate_gradient<kRough>(grad_own.x, z_own.x, shifted.x);
      const GateGradient right = gate_gradient<kRough>(grad_own.y, z_own.y, shifted.y);
      dz[i] = pack<T>(make_float2(left.gate, right.gate));
      const float2 dnormed = make_float2(left.normed, right.normed);
      dnorm_weight = multiply_add(dnormed, normed, dnorm_weight);
      dnorm_bias = dnorm_bias + dnormed;
      scaled[i] = dnormed * weight;
      y[i] = normed;
      cell(i) = make_float2(scaled[i].x + scaled[i].y, fmaf(scaled[i].x, normed.x, scaled[i].y * normed.y));
    }
    if (p.part != Part::kPassages)
      store(p.dz, chunk, dz);
    __syncwarp();
    float2 own_sums = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 two = *reinterpret_cast<const float4*>(tile + lane / 2 * kPairRow + 8 * i + 4 * (lane % 2));
      own_sums = own_sums + make_float2(two.x + two.z, two.y + two.w);
    }
    own_sums.x += __shfl_xor_sync(kWarp, own_sums.x, 1);
    own_sums.y += __shfl_xor_sync(kWarp, own_sums.y, 1);
    // Two places in turns: some warps may still read the sums of the chunk before.
    float2* const sums = all_sums + chunk % 2 * warps * kTileRows;
    if (lane % 2 == 0)
      sums[warp * kTileRows + lane / 2] = own_sums;
    __syncthreads();
    const float2 total = combine_group_sums(sums, warps);
    if (lane < kTileRows)
      means[lane] = total * (-statistics[lane].y / channels);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float2 own = means[i];
      const float rstd = statistics[i].y;
      y[i] = make_float2(
          fmaf(scaled[i].x, rstd, fmaf(y[i].x, own.y, own.x)), fmaf(scaled[i].y, rstd, fmaf(y[i].y, own.y, own.x)));
      if (!exists)
        y[i] = make_float2(0.f, 0.f);
    }
    __syncwarp();
  }

  // What the gradients of a chunk's sum add to that of a direction's state on its way through the chunk.
  template <int kDirection>
  __device__ __forceinline__ float2 added_in(int chunk, const float2 (&dy)[kChunk]) const {
    const float* const stage = stage_of(kDirection, chunk);
    float2 added = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      added = multiply_add(unpack(decay_since_entry<kDirection>(chunk, i)) * BC(stage, i).y, dy[i], added);
    return added;
  }

  __device__ __forceinline__ void scan_and_normalise() {
    PassagePair rightwards{make_float2(1.f, 1.f), make_float2(0.f, 0.f)}, leftwards = rightwards;
    dnorm_weight = dnorm_bias = make_float2(0.f, 0.f);
    for (int chunk = 0; chunk * step() < rows; ++chunk) {
      Pair<T> x[kChunk];
      float2 y[kChunk];
      load(p.x, x_row, chunk, x);
      const float2 skip = parameter(Layout::kSkip);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        y[i] = skip * unpack(x[i]);
      const float2 decay1 = scan<1>(chunk, x, y), decay0 = scan<0>(chunk, x, y);
      normalise_back(chunk, y);
      // The chunk comes last for gradients that go right, and first for those that go left.
      if (kPasses<1>) {
        if (chunk > 0) {
          added_before(chunk) = rightwards.added;
          if (kHasPassages)
            decay_before(chunk) = rightwards.decay;
        }
        rightwards.added = multiply_add(decay1, rightwards.added, added_in<1>(chunk, y));
        rightwards.decay = decay1 * rightwards.decay;
      }
      if (kPasses<0>) {
        leftwards.added = multiply_add(leftwards.decay, added_in<0>(chunk, y), leftwards.added);
        leftwards.decay = leftwards.decay * decay0;
      }
      park(chunk, y);
    }
    if (p.part != Part::kPassages) {
      add_to_share(layout.norm_weight(), dnorm_weight);
      add_to_share(layout.norm_bias(), dnorm_bias);
    }
    if (kHasPassages && p.blocks > 1 && p.part != Part::kGradients) {
      store_value(&passage_of(1, block()), rightwards);
      store_value(&passage_of(0, block()), leftwards);
    }
  }

  __device__ __forceinline__ PassagePair& passage_of(int direction, int block) const {
    return p.passages[place_in_image(direction, block) * warps * kLanes + threadIdx.x];
  }

  // The gradient that enters the block against a direction's travel.
  template <int kDirection>
  __device__ __forceinline__ float2 first_gradient() const {
    float2 gradient = make_float2(0.f, 0.f);
    if constexpr (kHasPassages) {
      for (int step = 0; step < (kDirection ? block() : p.blocks - 1 - block()); ++step) {
        const PassagePair& other = passage_of(kDirection, kDirection ? step : p.blocks - 1 - step);
        const float4 own = load_written(reinterpret_cast<const float4*>(&other));
        gradient = multiply_add(make_float2(own.x, own.y), gradient, make_float2(own.z, own.w));
      }
    }
    return gradient;
  }

  // A direction's gradients in a chunk, given that of the state that leaves it. Direction 0
  // has the skip's too. Leaves those of the raw time steps, times ln 2, in the tile.
  template <int kDirection>
  __device__ __forceinline__ void differentiate(
      int chunk, const Pair<T> (&x)[kChunk], float2& dstate, float2 (&dx)[kChunk], float& dB, float& dC) {
    const float2 A = parameter(kDirection * Layout::kDirection + Layout::kA), slope_A = A * kLn2;
    const float* const stage = stage_of(kDirection, chunk);
    const float scale = scale_of<Parked>(scales, chunk);
    float2 state = first_state<kDirection>(chunk), before[kChunk];
    project<kDirection>(chunk);
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = travelled<kDirection>(step);
      const float2 s = time_step(i), dy = get_parked(chunk, i);
      cell(i) = s;
      before[i] = state;
      state = advance(state, s, A, BC(stage, i).x, unpack(x[i]));
      narrow[i * kTileRow + lane] = scale * fmaf(dy.x, state.x, dy.y * state.y);
    }
    __syncwarp();
    dC = row_sum(narrow);
    __syncwarp();
    const float2 skip = parameter(Layout::kSkip) * scale;
    float2 own_dskip = make_float2(0.f, 0.f), own_dA = own_dskip;
#pragma unroll
    for (int step = kChunk - 1; step >= 0; --step) {
      const int i = travelled<kDirection>(step);
      const float2 own_BC = BC(stage, i), s = cell(i), own_x = unpack(x[i]), dy = get_parked(chunk, i);
      const float2 own = multiply_add(dy, scale * own_BC.y, dstate);
      dstate = decay(own, s, A);
      const float2 ddecay = dstate * before[i], own_s = own * s;
      dx[i] = own_s * own_BC.x;
      if (kDirection == 0) {
        dx[i] = multiply_add(skip, dy, dx[i]);
        own_dskip = multiply_add(dy, own_x, own_dskip);
      }
      narrow[i * kTileRow + lane] = fmaf(own_s.x, own_x.x, own_s.y * own_x.y);
      const float2 slope = make_float2(softplus2_slope<kExact>(s.x), softplus2_slope<kExact>(s.y));
      const float2 draw = multiply_add(ddecay, slope_A, own * own_x * own_BC.x) * slope;
      own_dA = multiply_add(ddecay, s, own_dA);
      if (!kHasOnes)
        dbias[kDirection] = dbias[kDirection] + draw;
      cell(i) = draw;
    }
    dA<kDirection>() = dA<kDirection>() + own_dA;
    if (kDirection == 0)
      dskip() = multiply_add(own_dskip, scale, dskip());
#pragma unroll
    for (int i = kChunk; i < kTileRows; ++i)
      cell(i) = make_float2(0.f, 0.f);
    __syncwarp();
    dB = row_sum(narrow);
  }

  // Whether a direction's sums for dt_weight wait where values are parked.
  template <int kDirection>
  static constexpr bool kAreParked = kDirection == 1 && Shared::kParksSums;

  __device__ __forceinline__ static float4 as_vector(const float (&own)[4]) {
    return make_float4(own[0], own[1], own[2], own[3]);
  }

  template <int kDirection>
  __device__ __forceinline__ void add_dweight(int chunk) {
    if constexpr (kAreParked<kDirection>) {
      float own[4][NR][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < NR; ++n) {
          const float4 total = summed[(m * NR + n) * kLanes];
          own[m][n][0] = total.x, own[m][n][1] = total.y, own[m][n][2] = total.z, own[m][n][3] = total.w;
        }
      add_dweight<kDirection>(chunk, own);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < NR; ++n)
          summed[(m * NR + n) * kLanes] = as_vector(own[m][n]);
    } else {
      add_dweight<kDirection>(chunk, dweight[kDirection]);
    }
  }

  // dt_weight's gradient (64, R) += (raw's gradient)^T (64, 16) . dt (16, R).
  template <int kDirection>
  __device__ __forceinline__ void add_dweight(int chunk, float (&total)[4][NR][4]) const {
    const float* const stage = stage_of(kDirection, chunk);
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* draw = tile + (8 * k + q) * kPairRow + 16 * m + g;
        const float a[4] = {draw[0], draw[8], draw[4 * kPairRow], draw[4 * kPairRow + 8]};
#pragma unroll
        for (int n = 0; n < NR; ++n) {
          const float* dt = stage + (8 * k + q) * kRow + 8 * n + g;
          multiply_rounded<kExact>(total[m][n], a, dt[0], dt[4 * kRow]);
        }
      }
  }

  // dt's gradient (16, R) = raw's gradient (16, 64) . dt_weight (64, R), over the warp's channels.
  template <int kDirection>
  __device__ __forceinline__ void transpose(float (&c)[NR][4]) {
    const float4* const weights = parameters(kDirection * Layout::kDirection + Layout::kTranspose);
#pragma unroll
    for (int n = 0; n < NR; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        c[n][i] = 0.f;
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      float a[4], a_next[4];
      load_fragment(a, tile + 8 * k, kPairRow);
      load_fragment(a_next, tile + 8 * k + 8, kPairRow);
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        const float4 b = weights[(4 * n + k / 2) * kLanes];
        multiply_rounded<kExact>(c[n], a, b.x, b.y);
        multiply_rounded<kExact>(c[n], a_next, b.z, b.w);
      }
    }
    __syncwarp();  // the tile has been read
  }

  __device__ __forceinline__ void put_partial(const float (&c)[NR][4], float dB, float dC) {
#pragma unroll
    for (int n = 0; n < NR; ++n) {
      float* const to = tile + g * kPairRow + 8 * n + 2 * q;
      *reinterpret_cast<float2*>(to) = make_float2(c[n][0], c[n][1]);
      *reinterpret_cast<float2*>(to + 8 * kPairRow) = make_float2(c[n][2], c[n][3]);
    }
    tile[lane / 2 * kPairRow + 8 * NR + lane % 2] = lane % 2 ? dC : kLn2 * dB;
  }

  // A direction's part of the projection's gradient: the sum over the warps of what stands in their tiles, four columns
  // a thread.
  template <int kDirection>
  __device__ __forceinline__ void store_dprojection(int chunk) const {
    constexpr int kQuads = kRow / 4;
    const int columns = rank + 2, count = valid(chunk);
    __syncthreads();
    for (int item = threadIdx.x; item < count * kQuads; item += warps * kLanes) {
      const int position = item / kQuads, first = item % kQuads * 4;
      const float* from = tiles + position * kPairRow + first;
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int other = 0; other < warps; ++other, from += Shared::kWarpFloats) {
        const float4 own = *reinterpret_cast<const float4*>(from);
        total = make_float4(total.x + own.x, total.y + own.y, total.z + own.z, total.w + own.w);
      }
      T* const to = p.dprojection + (row_of(chunk) + position) * 2 * columns + kDirection * columns;
      if (first == 8 * NR) {
        store_value(to + rank, static_cast<T>(total.x));
        store_value(to + rank + 1, static_cast<T>(total.y));
      } else {
        const float values[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + i < rank)
            store_value(to + first + i, static_cast<T>(values[i]));
      }
    }
    __syncthreads();
  }

  template <int kDirection>
  __device__ __forceinline__ void begin_sums() {
    dA<kDirection>() = dbias[kDirection] = make_float2(0.f, 0.f);
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n)
        if constexpr (kAreParked<kDirection>) {
          summed[(m * NR + n) * kLanes] = make_float4(0.f, 0.f, 0.f, 0.f);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            dweight[kDirection][m][n][i] = 0.f;
        }
  }

  template <int kDirection>
  __device__ __forceinline__ void add_sums() const {
    float4* const weights = reinterpret_cast<float4*>(share + layout.weights(kDirection)) + lane;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        float4& total = weights[(m * NR + n) * kLanes];
        float4 own;
        if constexpr (kAreParked<kDirection>)
          own = summed[(m * NR + n) * kLanes];
        else
          own = as_vector(dweight[kDirection][m][n]);
        total = make_float4(
            fmaf(kLog2e, own.x, total.x), fmaf(kLog2e, own.y, total.y), fmaf(kLog2e, own.z, total.z),
            fmaf(kLog2e, own.w, total.w));
      }
    const float2 A = parameter(kDirection * Layout::kDirection + Layout::kA);
    if (!kHasOnes)
      add_to_share(layout.dt_bias(kDirection), dbias[kDirection] * kLog2e);
    add_to_share(layout.A_log(kDirection), dA<kDirection>() * A * kLn2);
  }

  // What follows from a direction's gradients of the raw time steps. Loads are not moved across a __syncwarp, which
  // keeps the registers that wait for them few.
  template <int kDirection>
  __device__ __forceinline__ void add_up(int chunk, float dB, float dC) {
    float c[NR][4];
    __syncwarp();
    add_dweight<kDirection>(chunk);
    __syncwarp();
    transpose<kDirection>(c);
    put_partial(c, dB, dC);
    store_dprojection<kDirection>(chunk);
  }

  // The gradient that enters a chunk of direction 1, given the one that enters the block.
  __device__ __forceinline__ float2 entering_gradient(int chunk, float2 first) const {
    if (!kPasses<1> || p.are_independent || chunk == 0)
      return first;
    return kHasPassages ? multiply_add(decay_before(chunk), first, added_before(chunk)) : added_before(chunk);
  }

  // Both directions' gradients, from the last chunk to the first.
  __device__ __forceinline__ void differentiate_all() {
    begin_sums<0>();
    begin_sums<1>();
    dskip() = make_float2(0.f, 0.f);
    const float2 first1 = first_gradient<1>();
    float2 dstate0 = first_gradient<0>();
    for (int chunk = chunks() - 1; chunk >= 0; --chunk) {
      Pair<T> x[kChunk], own[kChunk];
      float dB, dC;
      float2 dx[kChunk], dstate1 = entering_gradient(chunk, first1);
      load(p.x, x_row, chunk, x);
      differentiate<1>(chunk, x, dstate1, dx, dB, dC);
      const float scale = Parking<T>::scale_up(dx);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        own[i] = pack<T>(dx[i]);
      add_up<1>(chunk, dB, dC);
      if (!kPasses<1> || p.are_independent)
        dstate0 = make_float2(0.f, 0.f);
      differentiate<0>(chunk, x, dstate0, dx, dB, dC);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        own[i] = pack<T>(multiply_add(unpack(own[i]), scale, dx[i]));
      add_up<0>(chunk, dB, dC);
      store(p.dx, chunk, own);
    }
    add_sums<0>();
    add_sums<1>();
    add_to_share(layout.D_skip(), dskip());
  }

  __device__ __forceinline__ void begin() const {
    for (int item = threadIdx.x; item < Shared::kStageFloats; item += blockDim.x)
      stages[item] = kHasOnes && item % kRow == rank ? 1.f : 0.f;
    float4* const own = reinterpret_cast<float4*>(share);
    // The lanes that will add: four values each to dt_weight's sums, two each to the others.
    for (int item = lane; item < layout.vectors() / 4; item += kLanes)
      own[item] = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int vector = 0; vector < 7; ++vector)
      reinterpret_cast<float2*>(share + layout.vectors() + vector * kGroup)[lane] = make_float2(0.f, 0.f);
  }

  // A block of positions, from its inputs to its gradients.
  __device__ __forceinline__ void take() {
    put_stages();
    __syncthreads();
    scan_and_normalise();
    if (kHasPassages && p.blocks > 1 && p.part == Part::kWhole) {
      cluster_arrive();
      cluster_wait();
    }
    if (kHasPassages && p.part == Part::kPassages)
      return;
    differentiate_all();
  }

  __device__ __forceinline__ void run() {
    begin();
    const int most = kBlockChunks * step();
    for (int next = blockIdx.x; next < p.items; next = item() + gridDim.x) {
      __syncthreads();
      if (threadIdx.x == 0) {
        item() = next;
        image() = next / p.blocks;
        block() = next % p.blocks;
      }
      if (p.are_independent) {
        first_row = next * most;
        rows = min(most, p.batch * p.length - first_row);
      } else {
        const int start = next % p.blocks * most;
        first_row = next / p.blocks * p.length + start;
        rows = min(most, p.length - start);
      }
      take();
    }
  }
};

// Threads that share the registers: those of a block; as many as two blocks have where both have room, of 5 warps each.
__host__ __device__ constexpr int backward_threads(int channels) {
  const int warps = channels ? (channels + kGroup - 1) / kGroup : kMaxBackwardWarps;
  return (warps == 5 ? 2 * warps : warps) * kLanes;
}

// Grid of any size, a warp for every 64 channels.
template <typename T, int NR, int kChunk, int kChannels>
__global__ void __launch_bounds__(backward_threads(kChannels), 1)
    scan_backward_kernel(const BackwardArguments<T> arguments) {
  BackwardWarp<T, NR, kChunk, kChannels> warp{arguments};
  warp.run();
}

}  // namespace mobilemamba
