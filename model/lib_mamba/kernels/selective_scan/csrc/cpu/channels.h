// Channels in vectors: padded to whole ones, in blocks of a few, one by one. Included once for each instruction set,
// after cpu/vector.h.

constexpr int WIDEST = 4;      // vectors of a block
constexpr int64_t ROUND = 16;  // floats: parts of a scratch memory begin at multiples of it

INLINE int64_t padded(int64_t channels) {
  return round_up(channels, LANES);
}

INLINE int64_t rounded(int64_t count) {
  return round_up(count, ROUND);
}

// Channels [start, start + num_vectors * LANES) of an image. A last vector that is not full is a block of its own.
struct Block {
  int64_t start;
  int num_vectors;
  int64_t count;  // of channels in use, in the last vector
  bool is_part;
};

static int64_t num_blocks(int64_t channels) {
  const int64_t full = channels / LANES;
  const int64_t left = full % WIDEST;
  return full / WIDEST + (left & 1) + (left >> 1) + (channels % LANES != 0);
}

// Blocks of four vectors, then of two, one, and the one that is not full.
static Block block_at(int64_t channels, int64_t index) {
  const int64_t full = channels / LANES;
  const int64_t wide = full / WIDEST;
  int64_t start = wide * WIDEST * LANES;
  if (index < wide)
    return {index * WIDEST * LANES, WIDEST, LANES, false};
  index -= wide;
  const int64_t left = full % WIDEST;
  if (left & 2) {
    if (index == 0)
      return {start, 2, LANES, false};
    index -= 1;
    start += 2 * LANES;
  }
  if (left & 1) {
    if (index == 0)
      return {start, 1, LANES, false};
    start += LANES;
  }
  return {start, 1, channels % LANES, true};
}

// Calls `body(num_vectors, is_part)` with those of a block as constants.
template <class Body>
INLINE void with_block(const Block& block, Body body) {
  if (block.is_part)
    body(Constant<1>(), Constant<true>());
  else if (block.num_vectors == 4)
    body(Constant<4>(), Constant<false>());
  else if (block.num_vectors == 2)
    body(Constant<2>(), Constant<false>());
  else
    body(Constant<1>(), Constant<false>());
}

// Calls `body(channel, is_part)` for every vector of a row: is_part is true for a last one that is not full.
template <class Body>
INLINE void for_each_channel(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES)
    body(c, Constant<false>());
  if (c < channels)
    body(c, Constant<true>());
}

// Calls `body(v, r)` for the vectors and rows of a tile that is held in registers, each in code of its own: registers
// have no addresses.
template <int ROWS, int NV, class Body>
INLINE void for_each_sum(Body body) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v)
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
      body(v, r);
}
