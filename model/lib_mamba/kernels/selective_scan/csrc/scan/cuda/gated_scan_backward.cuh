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
constexpr int kPairRow = 72;                // floats of a tile's row, two a lane
constexpr int kTileRows = 16;               // as the tensor cores take them
constexpr int kPairedRow = 4 * kLanes + 4;  // of a tile whose rows are two positions: four floats a lane
constexpr int kDrawRow = kLanes + 4;        // pairs of 16-bit values, one a lane

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

// Values of a chunk that lanes put away for themselves.
template <bool kExact>
struct Parking {
  using Type = float;
  using Stored = Pair<float>;

  // Scale them as they are stored. Returns what undoes the scale.
  template <int kChunk>
  __device__ __forceinline__ static float scale_up(float2 (&)[kChunk]) {
    return 1.f;
  }
};

// In half precision: bfloat16 would not do for sums and their gradients, as other sums, in which they cancel, follow.
// The warp's values are times a power of two that makes the most of the range.
template <>
struct Parking<false> {
  using Type = c10::Half;
  using Stored = Pair<c10::Half>;

  template <int kChunk>
  __device__ __forceinline__ static float scale_up(float2 (&values)[kChunk]) {
    float most = 1e-30f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      most = fmaxf(fmaxf(most, fabsf(values[i].x)), fabsf(values[i].y));
#pragma unroll
    for (int step = kLanes / 2; step; step /= 2)
      most = fmaxf(most, __shfl_xor_sync(kWarp, most, step));
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
  static constexpr int kHeaderFloats = 8;  // which positions the block has: BackwardWarp::header
  static constexpr int kStageRows = (kBlockChunks - 1) * kChunk + kTileRows;
  static constexpr int kStageFloats = 2 * kStageRows * rank_row(NR);
  // Of a warp.
  static constexpr int kTileFloats = kTileRows / 2 * kPairedRow;
  // A chunk's gradients of the raw time steps: pairs of 16-bit values, or of floats.
  static constexpr int kDrawFloats = kTileRows * (kExact ? kPairRow : kDrawRow);
  static constexpr int kPassageFloats = (kBlockChunks - 1) * (kGroup + (kHasPassages ? kGroup / (kExact ? 1 : 2) : 0));
  static constexpr int kLaneSumFloats = (kHasPassages ? 3 : 2) * kGroup;
  static constexpr int kRowFloats = 4 * kTileRows;
  // A chunk's decays in half precision fit where the gradients of the raw time steps will be.
  static constexpr int kParkedChunks = kBlockChunks + kExact;
  static constexpr int kParkedRow = kExact ? kLanes : kDrawRow;
  // For dt_weight they are read 16 rows at a time.
  static constexpr int kRoundedRows = (kBlockChunks * kChunk + kTileRows - 1) / kTileRows * kTileRows;
  static constexpr int kParkedRows = kExact ? kParkedChunks * kChunk : kRoundedRows;
  // The sums for dt_weight of direction 1, where registers cannot hold them.
  static constexpr bool kParksSums = NR > 2;
  static constexpr int kSummedFloats = kParksSums ? 512 * NR : 0;
  static constexpr int kParkedFloats = kParkedRows * kParkedRow * (kExact ? 2 : 1) + kSummedFloats;
  static constexpr int kWarpFloats = kTileFloats + kDrawFloats + kPassageFloats + kLaneSumFloats + kRowFloats;
  static constexpr int kSumFloats = 2 * 2 * kTileRows;  // pairs, of two chunks

  static constexpr int floats(int warps, bool is_parked_here) {
    const int warp_floats = kWarpFloats + kSumFloats + (is_parked_here ? kParkedFloats : 0);
    return kHeaderFloats + kStageFloats + warps * warp_floats;
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

template <typename T>
__device__ __forceinline__ void multiply_pairs(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, c10::Half>)
    multiply_half(c, a, b0, b1);
  else
    multiply_bfloat16(c, a, b0, b1);
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
  using Parked = Parking<kExact>;
  using Stored = typename Parked::Stored;
  struct alignas(2 * sizeof(Stored)) StoredTwice {
    Stored at[2];
  };
  // Whether step 1 finds how gradients of a direction's states pass through chunks.
  template <int kDirection>
  static constexpr bool kPasses = kDirection ? !is_chunk_an_image(kChannels, kChunk) : kHasPassages;
  // Known widths have chunks of one length.
  static constexpr bool kMayEndEarly = kChannels == 0 || kChunk == kPartialChunk;
  // Into global memory. Known widths are for sequences that 32 bits are enough for: registers are few.
  using Offset = std::conditional_t<(kChannels > 0), uint32_t, int64_t>;
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
  float* const draws = tile + Shared::kTileFloats;
  float2* const passages = reinterpret_cast<float2*>(draws + Shared::kDrawFloats) + lane;
  float2* const lane_sums = reinterpret_cast<float2*>(draws + Shared::kDrawFloats + Shared::kPassageFloats) + lane;
  float2* const statistics =
      reinterpret_cast<float2*>(draws + Shared::kDrawFloats + Shared::kPassageFloats + Shared::kLaneSumFloats);
  float2* const means = statistics + kTileRows;
  // Of the chunks' parked values; behind a row of the tile that nothing else reaches.
  float* const scales = tile + (kTileRows / 2 - 1) * kPairedRow + 4 * kLanes;
  float* const own_parked =
      (kParksHere || !p.parked ? tiles + warps * Shared::kWarpFloats
                               : p.parked + static_cast<int64_t>(blockIdx.x) * warps * Shared::kParkedFloats) +
      warp * Shared::kParkedFloats;
  Stored* const parked = reinterpret_cast<Stored*>(own_parked) + lane;
  float4* const summed = reinterpret_cast<float4*>(own_parked + Shared::kParkedFloats - Shared::kSummedFloats) + lane;
  const float* const own_parameters = p.prepared + warp * Layout::kFloats + 4 * lane;
  const ShareLayout layout{NR, kHasOnes};

  // Whether a direction's product for dt_weight waits until all chunks' gradients of the raw time steps are there: in
  // the places of the sum's, which have been used up.
  template <int kDirection>
  static constexpr bool kWaits = kDirection == 0 && kParksHere && !kExact;
  // Whether a direction's sums for dt_weight wait where values are parked.
  template <int kDirection>
  static constexpr bool kAreParked = kDirection == 1 && Shared::kParksSums;
  // Whether some of direction 1's wait behind the rows of parked values: where two blocks share the registers.
  static constexpr bool kUsesEnds = kWaits<0> && NR == 2 && (kChannels + kGroup - 1) / kGroup == 5;
  // Of direction 0 and of direction 1; of one of them where the other's are elsewhere.
  float dweight[kWaits<0> || kAreParked<1> ? 1 : 2][4][NR][4];
  float2 dbias[2];
  // What the gradients of the raw time steps are divided by, in half precision to fit its range; a power of two.
  float draw_unit;

  // The numbers of the block of positions and of its image, and its place in it; of the kept states, the first one of
  // direction 0 in the block; its first row of all (B * L), and how many it has. What is rarely read is kept in shared
  // memory: registers are few.
  enum Header { kItem, kImage, kBlock, kState, kFirstRow, kRows };
  __device__ __forceinline__ static int& header(Header place) { return reinterpret_cast<int*>(shared_memory())[place]; }
  __device__ __forceinline__ int step() const { return kChannels ? kChunk : p.step; }
  // Of at most 4: a sum takes fewer instructions than a division, and no register in between.
  __device__ __forceinline__ int chunks() const {
    const int rows = header(kRows);
    return 1 + (rows > step()) + (rows > 2 * step()) + (rows > 3 * step());
  }
  __device__ __forceinline__ int valid(int chunk) const {
    return kMayEndEarly ? min(step(), header(kRows) - chunk * step()) : kChunk;
  }
  __device__ __forceinline__ Offset row_of(int chunk) const {
    return static_cast<Offset>(header(kFirstRow)) + chunk * step();
  }
  __device__ __forceinline__ const float* stage_of(int direction, int chunk) const {
    return stages + (direction * Shared::kStageRows + chunk * step()) * kRow;
  }
  // ln 2 * B and C of positions i and i + 1 of a chunk, i even: they stand behind dt of the first one.
  __device__ __forceinline__ static float4 two_BC_of(const float* stage, int i) {
    return *reinterpret_cast<const float4*>(stage + i * kRow + 8 * NR);
  }
  // Of positions 2 k and 2 k + 1.
  __device__ __forceinline__ float4& pair_cell(int k) const {
    return reinterpret_cast<float4*>(tile + k * kPairedRow)[lane];
  }
  // Of two positions' values, those of position i.
  __device__ __forceinline__ static float2 own_of(const float4& two, int i) {
    return i % 2 ? make_float2(two.z, two.w) : make_float2(two.x, two.y);
  }
  __device__ __forceinline__ static void put_own(float4& two, int i, float2 value) {
    (i % 2 ? two.z : two.x) = value.x;
    (i % 2 ? two.w : two.y) = value.y;
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
  __device__ __forceinline__ Stored& decay_before(int chunk) const {
    return reinterpret_cast<Stored*>(passages - lane + (kBlockChunks - 1) * kLanes)[(chunk - 1) * kLanes + lane];
  }
  // Of direction 1, when all sums have been normalised.
  template <int kDirection>
  __device__ __forceinline__ float2& dA() const {
    return kDirection ? statistics[lane] : lane_sums[0];
  }
  __device__ __forceinline__ float2& dskip() const { return lane_sums[kLanes]; }
  // The decay through direction 1 of a chunk, while direction 0 is run and the sum normalised; then the gradient of
  // direction 0's state, while direction 1's gradients are made.
  __device__ __forceinline__ float2& waiting() const { return lane_sums[2 * kLanes]; }
  // Before there are any of these.
  __device__ __forceinline__ float2& dnorm_weight() const { return lane_sums[0]; }
  __device__ __forceinline__ float2& dnorm_bias() const { return lane_sums[kLanes]; }
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
    scales[chunk] = Parked::scale_up(values);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      parked[(chunk * kChunk + i) * Shared::kParkedRow] = pack<typename Parked::Type>(values[i]);
  }
  // To be multiplied by the chunk's scale.
  __device__ __forceinline__ float2 get_parked(int chunk, int i) const {
    return unpack(parked[(chunk * kChunk + i) * Shared::kParkedRow]);
  }

  // The warp's share of the parameters' gradients: rarely used, so that its address is not held in registers.
  __device__ __forceinline__ float* share() const {
    return p.shares + (static_cast<int64_t>(blockIdx.x) * warps + thread_index_again() / kLanes) * layout.group();
  }
  // Add to the block's share; each address belongs to one lane.
  __device__ __forceinline__ void add_to_share(int place, float2 value) const {
    float2* const to = reinterpret_cast<float2*>(share() + place) + lane;
    *to = *to + value;
  }

  // The projection of all positions of the block as [2][rows][dt, zeros up to 8 * NR, ln 2 * B and C of two positions].
  __device__ __forceinline__ void put_stages() {
    static_assert(8 * NR + 2 <= kLanes);  // two columns a lane: those left over repeat what others do
    // What follows from these would else be kept from one block of positions to the next.
    const int thread = thread_index_again(), warp = thread / kLanes;
    const int columns = rank + 2, width = 2 * columns, column = min(thread % kLanes * 2, width - 2);
    const auto is_dt = [&](int any) { return any % columns < rank; };
    const auto place = [&](int any) {
      const int direction = any >= columns, own = any - direction * columns;
      return direction * Shared::kStageRows * kRow + (is_dt(any) ? own : 8 * NR + own - rank);
    };
    const auto unit = [&](int any) { return any % columns == rank ? kLn2 : 1.f; };
    const float2 units = make_float2(unit(column), unit(column + 1));
    const T* from = p.projection + static_cast<Offset>(header(kFirstRow) + warp) * width + column;
    float* const left = stages + place(column);
    float* const right = stages + place(column + 1);
    const bool is_left_dt = is_dt(column), is_right_dt = is_dt(column + 1);
#pragma unroll 4
    for (int row = warp; row < header(kRows); row += warps, from += warps * width) {
      const float2 values = units * unpack(load_value(as_pairs(from)));
      // Of the second of two positions, B and C go to the row of the first one, behind its own.
      const int own = row * kRow, shared = row % step() % 2 ? own - kRow + 2 : own;
      left[is_left_dt ? own : shared] = values.x;
      right[is_right_dt ? own : shared] = values.y;
    }
  }

  // log2(e) * (dt_weight . dt + dt_bias) of a chunk into the tile; complete for the lane's own channels.
  template <int kDirection>
  __device__ __forceinline__ void project(int chunk) const {
    const float4* const weights = parameters(kDirection * Layout::kDirection + Layout::kProject);
    const float4* const biases = parameters(kDirection * Layout::kDirection + Layout::kBias);
    const float* const dt = stage_of(kDirection, chunk);
    float a[NR][4];
#pragma unroll
    for (int k = 0; k < NR; ++k)
      load_paired_fragment(a[k], dt + 8 * k, kRow);
    float4* const to = reinterpret_cast<float4*>(tile + g * kPairedRow) + q;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float left[4] = {}, right[4] = {};
      if (!kHasOnes) {
        const float4 bias = biases[j * kLanes];
        left[0] = left[2] = bias.x, left[1] = left[3] = bias.y;
        right[0] = right[2] = bias.z, right[1] = right[3] = bias.w;
      }
#pragma unroll
      for (int k = 0; k < NR; ++k) {
        const float4 b = weights[(4 * k + j) * kLanes];
        multiply_rounded<kExact>(left, a[k], b.x, b.y);
        multiply_rounded<kExact>(right, a[k], b.z, b.w);
      }
      to[8 * j] = make_float4(left[0], left[1], left[2], left[3]);
      to[8 * j + 4] = make_float4(right[0], right[1], right[2], right[3]);
    }
    __syncwarp();
    for (int i = valid(chunk); i < kChunk; ++i)
      put_own(pair_cell(i / 2), i, make_float2(kMasked, kMasked));
  }

  __device__ __forceinline__ static float2 time_step(float2 raw) {
    return make_float2(softplus2_of<T>(raw.x), softplus2_of<T>(raw.y));
  }
  __device__ __forceinline__ static float2 decay(float2 value, float2 s, float2 A) {
    return make_float2(decayed<kExact>(value.x, s.x, A.x), decayed<kExact>(value.y, s.y, A.y));
  }
  __device__ __forceinline__ static float2 advance(float2 state, float2 s, float2 A, float B, float2 x) {
    return make_float2(advanced<kExact>(state.x, s.x, A.x, B, x.x), advanced<kExact>(state.y, s.y, A.y, B, x.y));
  }

  // Of a block of the same image, in (B, 2, blocks).
  __device__ __forceinline__ Offset place_in_image(int direction, int block) const {
    return (static_cast<Offset>(header(kImage)) * 2 + direction) * p.blocks + block;
  }

  // The state that enters a chunk in its travel.
  template <int kDirection>
  __device__ __forceinline__ float2 first_state(int chunk) const {
    if (p.image_states == 0)
      return make_float2(0.f, 0.f);
    const int own = header(kState) + kDirection * p.image_states + chunk;
    return load_value(reinterpret_cast<const float2*>(p.states + static_cast<Offset>(own) * channels + readable));
  }

  // Where a chunk's decays since the direction's entry, at positions 2 k and 2 k + 1, wait for the gradient of the sum:
  // direction 1's where that will be parked.
  template <int kDirection>
  __device__ __forceinline__ StoredTwice& decays_since_entry(int chunk, int k) const {
    if (kDirection == 0 && !kExact)
      return reinterpret_cast<StoredTwice*>(draws)[k * kLanes + lane];
    Stored* const rows = parked - lane + ((kDirection ? chunk : kBlockChunks) * kChunk + 2 * k) * Shared::kParkedRow;
    return reinterpret_cast<StoredTwice*>(rows)[lane];
  }

  // Add a direction's C * state at the positions of a chunk; returns the decay through all of it.
  template <int kDirection>
  __device__ __forceinline__ float2 scan(int chunk, const Pair<T> (&x)[kChunk], float2 (&y)[kChunk]) const {
    float2 state = first_state<kDirection>(chunk), through = make_float2(1.f, 1.f);
    project<kDirection>(chunk);
    const float2 A = parameter(kDirection * Layout::kDirection + Layout::kA);
    const float* const stage = stage_of(kDirection, chunk);
    float4 raw, two_BC;
    StoredTwice decays;
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = travelled<kDirection>(step);
      if (step == 0 || i % 2 == kDirection)
        raw = pair_cell(i / 2), two_BC = two_BC_of(stage, i / 2 * 2);
      const float2 own_BC = own_of(two_BC, i), s = time_step(own_of(raw, i));
      state = advance(state, s, A, own_BC.x, unpack(x[i]));
      y[i] = multiply_add(state, own_BC.y, y[i]);
      if (kPasses<kDirection>) {
        through = decay(through, s, A);
        decays.at[i % 2] = pack<typename Parked::Type>(through);
        if (step == kChunk - 1 || i % 2 != kDirection)
          decays_since_entry<kDirection>(chunk, i / 2) = decays;
      }
    }
    end_basic_block(p.batch < 0);
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
    float2 own_dweight = dnorm_weight(), own_dbias = dnorm_bias();
    float2 scaled[kChunk];  // gradient of the normalised value
    float4 two;
    if constexpr (kChunk % 2)
      two = make_float4(0.f, 0.f, 0.f, 0.f);  // the last pair has one position
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
      own_dweight = multiply_add(dnormed, normed, own_dweight);
      own_dbias = own_dbias + dnormed;
      scaled[i] = dnormed * weight;
      y[i] = normed;
      put_own(two, i, make_float2(scaled[i].x + scaled[i].y, fmaf(scaled[i].x, normed.x, scaled[i].y * normed.y)));
      if (i % 2 || i == kChunk - 1)
        pair_cell(i / 2) = two;
      if (i == kChunk / 2)
        end_basic_block(p.batch < 0);
    }
    dnorm_weight() = own_dweight;
    dnorm_bias() = own_dbias;
    if (p.part != Part::kPassages)
      store(p.dz, chunk, dz);
    __syncwarp();
    const float2 own_sums = sum_of_lanes();
    // Two places in turns: some warps may still read the sums of the chunk before.
    float2* const sums = all_sums + chunk % 2 * warps * kTileRows;
    if (q < 2)
      sums[warp * kTileRows + 2 * g + q] = own_sums;
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
    StoredTwice decays;
    float4 two_BC;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i % 2 == 0)
        decays = decays_since_entry<kDirection>(chunk, i / 2), two_BC = two_BC_of(stage, i);
      added = multiply_add(unpack(decays.at[i % 2]) * own_of(two_BC, i).y, dy[i], added);
    }
    return added;
  }

  __device__ __forceinline__ void scan_and_normalise() {
    PassagePair rightwards{make_float2(1.f, 1.f), make_float2(0.f, 0.f)}, leftwards = rightwards;
    dnorm_weight() = dnorm_bias() = make_float2(0.f, 0.f);
    for (int chunk = 0; chunk * step() < header(kRows); ++chunk) {
      Pair<T> x[kChunk];
      float2 y[kChunk];
      load(p.x, x_row, chunk, x);
      const float2 skip = parameter(Layout::kSkip);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        y[i] = skip * unpack(x[i]);
      float2 decay1 = scan<1>(chunk, x, y);
      if (kHasPassages)
        waiting() = decay1;
      const float2 decay0 = scan<0>(chunk, x, y);
      normalise_back(chunk, y);
      if (kHasPassages)
        decay1 = waiting();
      // The chunk comes last for gradients that go right, and first for those that go left.
      if (kPasses<1>) {
        if (chunk > 0) {
          added_before(chunk) = rightwards.added;
          if (kHasPassages)
            decay_before(chunk) = pack<typename Parked::Type>(rightwards.decay);
        }
        rightwards.added = multiply_add(decay1, rightwards.added, added_in<1>(chunk, y));
        rightwards.decay = decay1 * rightwards.decay;
      }
      if (kPasses<0>) {
        leftwards.added = multiply_add(leftwards.decay, added_in<0>(chunk, y), leftwards.added);
        leftwards.decay = leftwards.decay * decay0;
      }
      __syncwarp();  // decays have been read
      park(chunk, y);
    }
    if (p.part != Part::kPassages) {
      add_to_share(layout.norm_weight(), dnorm_weight());
      add_to_share(layout.norm_bias(), dnorm_bias());
    }
    if (kHasPassages && p.blocks > 1 && p.part != Part::kGradients) {
      store_value(&passage_of(1, header(kBlock)), rightwards);
      store_value(&passage_of(0, header(kBlock)), leftwards);
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
      for (int step = 0; step < (kDirection ? header(kBlock) : p.blocks - 1 - header(kBlock)); ++step) {
        const PassagePair& other = passage_of(kDirection, kDirection ? step : p.blocks - 1 - step);
        const float4 own = load_written(reinterpret_cast<const float4*>(&other));
        gradient = multiply_add(make_float2(own.x, own.y), gradient, make_float2(own.z, own.w));
      }
    }
    return gradient;
  }

  // A lane's gradients of the raw time steps, times ln 2, at position i of a chunk.
  template <int kDirection>
  __device__ __forceinline__ void put_draw(int chunk, int i, float2 draw) const {
    if constexpr (kExact)
      *reinterpret_cast<float2*>(draws + i * kPairRow + 2 * lane) = draw;
    else
      pairs_of_draws<kDirection>(chunk)[i * kDrawRow + lane] = pack<T>(draw).bits;
  }
  // [position][lane].
  template <int kDirection>
  __device__ __forceinline__ uint32_t* pairs_of_draws(int chunk) const {
    return kWaits<kDirection> ? reinterpret_cast<uint32_t*>(parked - lane) + chunk * kChunk * kDrawRow
                              : reinterpret_cast<uint32_t*>(draws);
  }

  // A direction's gradients in a chunk, given that of the state that leaves it. Leaves those of the raw time steps, and
  // in the tile each lane's of B, and of C to be scaled. Direction 1 also leaves its share of dx, to which direction 0
  // adds its own and the skip's; it stores the sum.
  template <int kDirection>
  __device__ __forceinline__ void differentiate(
      int chunk, const Pair<T> (&x)[kChunk], float2& dstate, float2 (&dx)[kChunk]) {
    const float2 A = parameter(kDirection * Layout::kDirection + Layout::kA), slope_A = A * kLn2;
    const float* const stage = stage_of(kDirection, chunk);
    float2 state = first_state<kDirection>(chunk), before[kChunk];
    float4 steps, two_BC;
    project<kDirection>(chunk);
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = travelled<kDirection>(step);
      if (step == 0 || i % 2 == kDirection)
        steps = pair_cell(i / 2), two_BC = two_BC_of(stage, i / 2 * 2);
      const float2 s = time_step(own_of(steps, i));
      put_own(steps, i, s);
      before[i] = state;
      state = advance(state, s, A, own_of(two_BC, i).x, unpack(x[i]));
      if (step == kChunk - 1 || i % 2 != kDirection)
        pair_cell(i / 2) = steps;
    }
    const float scale = scales[chunk], up = 1.f / draw_unit;
    const float2 skip = parameter(Layout::kSkip) * scale;
    float2 own_dskip = make_float2(0.f, 0.f), own_dA = own_dskip;
    float4 dBC;
    if constexpr (kChunk % 2)
      dBC = make_float4(0.f, 0.f, 0.f, 0.f);  // the last pair has one position
    const int count = !exists ? 0 : kMayEndEarly ? valid(chunk) : kChunk;
    T* const to = p.dx + row_of(chunk) * channels + readable;
#pragma unroll
    for (int step = kChunk - 1; step >= 0; --step) {
      const int i = travelled<kDirection>(step);
      if (step == kChunk - 1 || i % 2 != kDirection)
        steps = pair_cell(i / 2), two_BC = two_BC_of(stage, i / 2 * 2);
      const float2 own_BC = own_of(two_BC, i), s = own_of(steps, i), own_x = unpack(x[i]);
      const float2 dy = get_parked(chunk, i);
      const float dC = fmaf(dy.x, state.x, dy.y * state.y);
      state = before[i];
      const float2 own = multiply_add(dy, scale * own_BC.y, dstate);
      dstate = decay(own, s, A);
      const float2 ddecay = dstate * state, own_s = own * s;
      if (kDirection == 0) {
        const Pair<T> total = pack<T>(multiply_add(own_s, own_BC.x, multiply_add(skip, dy, dx[i])));
        if (i < count)
          store_value(as_pairs(to + i * channels), total);
        own_dskip = multiply_add(dy, own_x, own_dskip);
      } else {
        dx[i] = own_s * own_BC.x;
      }
      put_own(dBC, i, make_float2(fmaf(own_s.x, own_x.x, own_s.y * own_x.y), dC));
      const float2 slope = make_float2(softplus2_slope<kExact>(s.x, up), softplus2_slope<kExact>(s.y, up));
      const float2 draw = multiply_add(ddecay, slope_A, own * own_x * own_BC.x) * slope;
      own_dA = multiply_add(ddecay, s, own_dA);
      if (!kHasOnes)
        dbias[kDirection] = dbias[kDirection] + draw;
      put_draw<kDirection>(chunk, i, draw);
      if (step == 0 || i % 2 == kDirection)
        pair_cell(i / 2) = dBC;
      if (step == kChunk / 2)
        end_basic_block(p.batch < 0);
    }
    dA<kDirection>() = dA<kDirection>() + own_dA;
    if (kDirection == 0)
      dskip() = multiply_add(own_dskip, scale, dskip());
  }

  // The sums over the lanes of what stands in the tile, two values of each position: of position 2 g + q in lanes with
  // q < 2, which are 4 g + q.
  __device__ __forceinline__ float2 sum_of_lanes() const {
    const float one = g == q ? 1.f : 0.f;  // of columns k to k + 7, every fourth
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    // The rows of the product are those of the tile's left half, then of its right one.
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      float a[4];
      load_halves_fragment(a, tile + 8 * k, kPairedRow, 2 * kLanes);
      multiply_rounded<kExact>(c, a, one, one);
    }
    return make_float2(c[0] + c[2], c[1] + c[3]);
  }

  // dt_weight's gradient (64, R) += (raw's gradient)^T (64, 16) . dt (16, R), for 16 positions of the block.
  template <int kDirection>
  __device__ __forceinline__ void add_dweight(int first, float (&total)[4][NR][4]) const {
    const float* const stage = stages + (kDirection * Shared::kStageRows + first) * kRow;
    if constexpr (kExact) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float* draw = draws + (8 * k + q) * kPairRow + 16 * m + g;
          const float a[4] = {draw[0], draw[8], draw[4 * kPairRow], draw[4 * kPairRow + 8]};
#pragma unroll
          for (int n = 0; n < NR; ++n) {
            const float* dt = stage + (8 * k + q) * kRow + 8 * n + g;
            multiply_rounded<kExact>(total[m][n], a, dt[0], dt[4 * kRow]);
          }
        }
    } else {
      uint32_t b[NR][2];
#pragma unroll
      for (int n = 0; n < NR; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* dt = stage + (8 * i + 2 * q) * kRow + 8 * n + g;
          b[n][i] = pack<T>(make_float2(dt[0], dt[kRow])).bits;
        }
      const uint32_t* const pairs = kWaits<kDirection> ? pairs_of_draws<kDirection>(0) + first * kDrawRow
                                                       : reinterpret_cast<const uint32_t*>(draws);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t a[4];
        load_transposed_fragment(a, pairs + 8 * m, kDrawRow);
#pragma unroll
        for (int n = 0; n < NR; ++n)
          multiply_pairs<T>(total[m][n], a, b[n][0], b[n][1]);
      }
    }
  }

  // dt's gradient (16, R) = raw's gradient (16, 64) . dt_weight (64, R), over the warp's channels.
  template <int kDirection>
  __device__ __forceinline__ void transpose(int chunk, float (&c)[NR][4]) const {
    const float4* const weights = parameters(kDirection * Layout::kDirection + Layout::kTranspose);
#pragma unroll
    for (int n = 0; n < NR; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        c[n][i] = 0.f;
    if constexpr (kExact) {
#pragma unroll
      for (int k = 0; k < 8; k += 2) {
        float a[4], a_next[4];
        load_fragment(a, draws + 8 * k, kPairRow);
        load_fragment(a_next, draws + 8 * k + 8, kPairRow);
#pragma unroll
        for (int n = 0; n < NR; ++n) {
          const float4 b = weights[(4 * n + k / 2) * kLanes];
          multiply_rounded<kExact>(c[n], a, b.x, b.y);
          multiply_rounded<kExact>(c[n], a_next, b.z, b.w);
        }
      }
    } else {
      const uint32_t* const pairs = pairs_of_draws<kDirection>(chunk);
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        uint32_t a[4], a_next[4];
        load_fragment(a, pairs + 8 * k, kDrawRow, kChunk);
        load_fragment(a_next, pairs + 8 * k + 8, kDrawRow, kChunk);
#pragma unroll
        for (int n = 0; n < NR; ++n) {
          const float4 b = weights[(2 * n + k / 2) * kLanes];
          multiply_pairs<T>(c[n], a, __float_as_uint(b.x), __float_as_uint(b.y));
          multiply_pairs<T>(c[n], a_next, __float_as_uint(b.z), __float_as_uint(b.w));
        }
      }
    }
  }

  // The warp's part of a direction's projection gradient, as [position][dt, B, C], into the tile.
  __device__ __forceinline__ void put_partial(int chunk, const float (&c)[NR][4], float2 dBC) const {
    const float scale = scales[chunk];
#pragma unroll
    for (int n = 0; n < NR; ++n) {
      float* const to = tile + g * kRow + 8 * n + 2 * q;
      *reinterpret_cast<float2*>(to) = make_float2(c[n][0], c[n][1]) * draw_unit;
      *reinterpret_cast<float2*>(to + 8 * kRow) = make_float2(c[n][2], c[n][3]) * draw_unit;
    }
    if (q < 2)
      *reinterpret_cast<float2*>(tile + (2 * g + q) * kRow + 8 * NR) = make_float2(kLn2 * dBC.x, scale * dBC.y);
  }

  // A direction's part of the projection's gradient: the sum over the warps of what stands in their tiles, two columns
  // a thread.
  template <int kDirection>
  __device__ __forceinline__ void store_dprojection(int chunk) const {
    constexpr int kPairs = 4 * NR + 1;
    const int columns = rank + 2, count = valid(chunk);
    __syncthreads();
    for (int item = threadIdx.x; item < count * kPairs; item += warps * kLanes) {
      const int position = item / kPairs, first = item % kPairs * 2;
      const float* from = tiles + position * kRow + first;
      float2 total = make_float2(0.f, 0.f);
#pragma unroll
      for (int other = 0; other < warps; ++other, from += Shared::kWarpFloats)
        total = total + *reinterpret_cast<const float2*>(from);
      // B and C come behind the place of 8 * NR columns of dt, but behind `rank` of them in memory.
      const bool is_dt = first < 8 * NR;
      const int column = is_dt ? first : rank, end = is_dt ? rank : columns;
      T* const to = p.dprojection + (row_of(chunk) + position) * 2 * columns + kDirection * columns + column;
      if (column < end)
        store_value(to, static_cast<T>(total.x));
      if (column + 1 < end)
        store_value(to + 1, static_cast<T>(total.y));
    }
    __syncthreads();
  }

  template <int kDirection>
  __device__ __forceinline__ float (&dweight_of())[4][NR][4] {
    return dweight[kDirection == 1 && !kWaits<0> && !kAreParked<1>];
  }

  __device__ __forceinline__ static void clear(float (&total)[4][NR][4]) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          total[m][n][i] = 0.f;
  }

  __device__ __forceinline__ void park_sums(const float (&total)[4][NR][4]) const {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n)
        summed[(m * NR + n) * kLanes] = make_float4(total[m][n][0], total[m][n][1], total[m][n][2], total[m][n][3]);
  }

  __device__ __forceinline__ void take_sums(float (&total)[4][NR][4]) const {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        const float4 own = summed[(m * NR + n) * kLanes];
        total[m][n][0] = own.x, total[m][n][1] = own.y, total[m][n][2] = own.z, total[m][n][3] = own.w;
      }
  }

  // Pairs of them, in the ends of the rows of parked values and of `draws`: four floats that no step uses, once the
  // sum has been normalised.
  static constexpr int kEnds = kBlockChunks + 1;
  __device__ __forceinline__ float2& row_end(int n) const {
    float* const rows = n < kBlockChunks ? own_parked + n * kTileRows * kDrawRow : draws;
    return reinterpret_cast<float2*>(rows + lane / 2 * kDrawRow + kLanes)[lane % 2];
  }
  __device__ __forceinline__ static float* pair_of(float (&total)[4][NR][4], int n) {
    return total[n / 2 / NR][n / 2 % NR] + n % 2 * 2;
  }
  __device__ __forceinline__ void put_into_ends(float (&total)[4][NR][4]) const {
#pragma unroll
    for (int n = 0; n < kEnds; ++n)
      row_end(n) = make_float2(pair_of(total, n)[0], pair_of(total, n)[1]);
  }
  __device__ __forceinline__ void take_from_ends(float (&total)[4][NR][4]) const {
#pragma unroll
    for (int n = 0; n < kEnds; ++n)
      pair_of(total, n)[0] = row_end(n).x, pair_of(total, n)[1] = row_end(n).y;
  }

  template <int kDirection>
  __device__ __forceinline__ void begin_sums() {
    dA<kDirection>() = dbias[kDirection] = make_float2(0.f, 0.f);
    float none[4][NR][4];
    clear(none);
    if constexpr (kAreParked<kDirection>)
      park_sums(none);
    else if constexpr (!kWaits<kDirection>)
      clear(dweight_of<kDirection>());
    if constexpr (kUsesEnds && kDirection == 1)
      put_into_ends(none);
  }

  template <int kDirection>
  __device__ __forceinline__ void add_sums(const float (&total)[4][NR][4]) {
    const float unit = kLog2e * draw_unit;
    float4* const weights = reinterpret_cast<float4*>(share() + layout.weights(kDirection)) + lane;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        const float (&own)[4] = total[m][n];
        float4& sum = weights[(m * NR + n) * kLanes];
        sum = make_float4(
            fmaf(unit, own[0], sum.x), fmaf(unit, own[1], sum.y), fmaf(unit, own[2], sum.z), fmaf(unit, own[3], sum.w));
      }
    const float2 A = parameter(kDirection * Layout::kDirection + Layout::kA);
    if (!kHasOnes)
      add_to_share(layout.dt_bias(kDirection), dbias[kDirection] * unit);
    add_to_share(layout.A_log(kDirection), dA<kDirection>() * A * kLn2);
  }

  template <int kDirection>
  __device__ __forceinline__ void add_sums() {
    float own[4][NR][4];
    if constexpr (kAreParked<kDirection>) {
      take_sums(own);
      add_sums<kDirection>(own);
    } else if constexpr (kWaits<kDirection>) {
      clear(own);
      add_waiting_dweight(own);
      add_sums<kDirection>(own);
    } else {
      if constexpr (kUsesEnds)
        take_from_ends(dweight_of<kDirection>());
      add_sums<kDirection>(dweight_of<kDirection>());
    }
  }

  // The products that have waited for all chunks.
  __device__ __forceinline__ void add_waiting_dweight(float (&total)[4][NR][4]) const {
    uint32_t* const pairs = pairs_of_draws<0>(0);
    int last = chunks() * step();
    for (; last % kTileRows != 0; ++last)
      pairs[last * kDrawRow + lane] = 0u;
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < last; first += kTileRows)
      add_dweight<0>(first, total);
  }

  // What follows from a direction's gradients of the raw time steps. Loads are not moved across a __syncwarp, which
  // keeps the registers that wait for them few.
  template <int kDirection>
  __device__ __forceinline__ void add_up(int chunk) {
    float c[NR][4];
    __syncwarp();
    const float2 dBC = sum_of_lanes();
    if constexpr (kAreParked<kDirection>) {
      float own[4][NR][4];
      take_sums(own);
      add_dweight<kDirection>(chunk * step(), own);
      park_sums(own);
    } else if constexpr (!kWaits<kDirection>) {
      if constexpr (kUsesEnds)
        take_from_ends(dweight_of<kDirection>());
      add_dweight<kDirection>(chunk * step(), dweight_of<kDirection>());
      if constexpr (kUsesEnds)
        put_into_ends(dweight_of<kDirection>());
    }
    __syncwarp();
    transpose<kDirection>(chunk, c);
    put_partial(chunk, c, dBC);
    store_dprojection<kDirection>(chunk);
  }

  // In place of how gradients pass to the chunks in direction 1: the gradients that enter them, given the block's.
  __device__ __forceinline__ void put_entering_gradients(float2 first) const {
    if (kHasPassages && !p.are_independent)
      for (int chunk = 1; chunk < chunks(); ++chunk)
        added_before(chunk) = multiply_add(unpack(decay_before(chunk)), first, added_before(chunk));
    __syncwarp();
    entering_block() = first;
  }
  __device__ __forceinline__ float2& entering_block() const { return passages[(kBlockChunks - 1) * kLanes]; }
  __device__ __forceinline__ float2 entering_gradient(int chunk) const {
    if (!kPasses<1> || p.are_independent)
      return make_float2(0.f, 0.f);
    if (chunk == 0)
      return kHasPassages ? entering_block() : make_float2(0.f, 0.f);
    return added_before(chunk);
  }

  // In half precision values up to 2^24 times the largest gradient of a sum fit, and those above 2^-6 of it lose
  // nothing.
  __device__ __forceinline__ void find_draw_unit() {
    draw_unit = 1.f;
    if constexpr (std::is_same_v<T, c10::Half>) {
      float most = scales[0];
      for (int chunk = 1; chunk < chunks(); ++chunk)
        most = fmaxf(most, scales[chunk]);
      draw_unit = most * 0x1p23f;
    }
  }

  // Both directions' gradients, from the last chunk to the first.
  __device__ __forceinline__ void differentiate_all() {
    begin_sums<0>();
    begin_sums<1>();
    dskip() = make_float2(0.f, 0.f);
    find_draw_unit();
    if (kHasPassages)
      put_entering_gradients(first_gradient<1>());
    float2 dstate0 = first_gradient<0>();
    if (kHasPassages)
      waiting() = dstate0;
    for (int chunk = chunks() - 1; chunk >= 0; --chunk) {
      Pair<T> x[kChunk];
      float2 dx[kChunk], dstate1 = entering_gradient(chunk);
      load(p.x, x_row, chunk, x);
      differentiate<1>(chunk, x, dstate1, dx);
      add_up<1>(chunk);
      if (kHasPassages)
        dstate0 = waiting();
      if (!kPasses<1> || p.are_independent)
        dstate0 = make_float2(0.f, 0.f);
      differentiate<0>(chunk, x, dstate0, dx);
      if (kHasPassages)
        waiting() = dstate0;
      add_up<0>(chunk);
    }
    add_sums<1>();
    add_sums<0>();
    add_to_share(layout.D_skip(), dskip());
  }

  __device__ __forceinline__ void begin() const {
    for (int item = threadIdx.x; item < Shared::kStageFloats; item += blockDim.x)
      stages[item] = kHasOnes && item % kRow == rank ? 1.f : 0.f;
    // Products take 16 positions.
    for (int item = lane; item < Shared::kDrawFloats; item += kLanes)
      draws[item] = 0.f;
    float4* const own = reinterpret_cast<float4*>(share());
    // The lanes that will add: four values each to dt_weight's sums, two each to the others.
    for (int item = lane; item < layout.vectors() / 4; item += kLanes)
      own[item] = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int vector = 0; vector < 7; ++vector)
      reinterpret_cast<float2*>(share() + layout.vectors() + vector * kGroup)[lane] = make_float2(0.f, 0.f);
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

  // Which positions the block has, by one thread.
  __device__ __forceinline__ void put_header(int item) const {
    const int most = kBlockChunks * step();
    const int image = item / p.blocks, block = item % p.blocks;
    header(kItem) = item;
    header(kImage) = image;
    header(kBlock) = block;
    header(kState) = 2 * image * p.image_states + block * kBlockChunks;
    // Of images of one chunk, a block has several.
    header(kFirstRow) = p.are_independent ? item * most : image * p.length + block * most;
    header(kRows) = min(most, p.are_independent ? p.batch * p.length - item * most : p.length - block * most);
  }

  __device__ __forceinline__ void run() {
    begin();
    for (int item = blockIdx.x; item < p.items; item = header(kItem) + gridDim.x) {
      __syncthreads();
      if (threadIdx.x == 0)
        put_header(item);
      __syncthreads();
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
