// The scan's kernels going forward. Included once for each instruction set, after cpu/channels.h.
//
// Channels are cut into blocks of a few vectors; a block is scanned from end to end with its state in registers. The
// sums of the directions go to a scratch image of L * padded(D) floats: block after block, rows within.
//
// With v = dt_weight . dt + dt_bias and s = log2(1 + 2^(v * log2 e)): delta = s * ln 2, and the decay is
// 2^(-exp(A_log) * s). The time steps of a tile of positions are computed first, all at once; then the state runs
// through the tile.

constexpr int TILE = 16;  // positions, even and a multiple of LANES
static_assert(TILE % LANES == 0, "a tile is transposed in squares of LANES");

// Floats of work memory that the kernels below take.
static int64_t work_size(const Problem& p, bool is_backward) {
  const int64_t widest = WIDEST * LANES;
  int64_t block = (2 * p.rank + 4 * p.states + 4) * widest;
  if (is_backward)
    block += (p.states * (p.length + 1) + 2 * p.length + 2) * widest;
  const int64_t row = 6 * padded(p.channels);
  return rounded((block > row ? block : row) + ROUND);
}

// A block's share of the parameters of one direction, rows of NV * LANES, zero where there are no channels.
template <int NV, bool IS_PART>
INLINE void gather(float* to, const float* from, int64_t rows, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < rows; ++i)
    for (int v = 0; v < NV; ++v)
      store(to + (i * NV + v) * LANES, load<IS_PART>(from + i * stride + v * LANES, count));
}

template <int NV>
struct Parameters {
  float *weight, *bias, *rate;  // (R, .), (.), (N, .): the rate is -exp(A_log)

  Parameters(float*& work, const Problem& p) {
    weight = work;
    bias = weight + p.rank * NV * LANES;
    rate = bias + NV * LANES;
    work = rate + p.states * NV * LANES;
  }

  template <bool IS_PART>
  void read(const Problem& p, int64_t k, const Block& block) {
    const int64_t D = p.channels;
    gather<NV, IS_PART>(weight, p.dt_weight + k * p.rank * D + block.start, p.rank, D, block.count);
    gather<NV, IS_PART>(bias, p.dt_bias + k * D + block.start, 1, D, block.count);
    gather<NV, IS_PART>(rate, p.A_log + k * p.states * D + block.start, p.states, D, block.count);
    for (int64_t i = 0; i < p.states * NV; ++i)
      store(rate + i * LANES, -exp2(load(rate + i * LANES) * LOG2E));
  }
};

// s for `count` positions, two at a time: `to` must hold an even number of rows.
template <int NV>
INLINE void time_steps(
    float* to, const Parameters<NV>& parameters, const float* dt, int64_t width, int count, int64_t rank) {
  for (int i = 0; i < count; i += 2) {
    const float* first = dt + i * width;
    const float* second = i + 1 < count ? first + width : first;
    Vec a[NV], b[NV];
    for (int v = 0; v < NV; ++v)
      a[v] = b[v] = load(parameters.bias + v * LANES);
    for (int64_t r = 0; r < rank; ++r)
      for (int v = 0; v < NV; ++v) {
        const Vec weight = load(parameters.weight + (r * NV + v) * LANES);
        a[v] += weight * first[r];
        b[v] += weight * second[r];
      }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      store(to + (i * NV + v) * LANES, softplus2(a[v] * LOG2E));
      store(to + ((i + 1) * NV + v) * LANES, softplus2(b[v] * LOG2E));
    }
  }
}

// One state component through a tile, in the order of travel; its share of the output into `sums`.
template <class T, int NV, bool IS_PART, bool IS_FIRST>
INLINE void advance(
    const Problem& p, const T* x, int64_t count, const float* steps, const float* B, const float* C, const float* rates,
    float* states, const float* skips, float* sums, int num_rows, bool is_reverse) {
  const int64_t width = p.width();
  Vec state[NV], rate[NV];
  for (int v = 0; v < NV; ++v) {
    state[v] = load(states + v * LANES);
    rate[v] = load(rates + v * LANES);
  }
  for (int i = 0; i < num_rows; ++i) {
    const int64_t t = is_reverse ? num_rows - 1 - i : i;
    const float b = B[t * width] * LN2;
    const float c = C[t * width];
    for (int v = 0; v < NV; ++v) {
      const Vec step = load(steps + (t * NV + v) * LANES);
      const Vec input = load<IS_PART>(x + t * p.x_row + v * LANES, count);
      state[v] = decay(rate[v] * step, state[v], step * input * b);
      float* out = sums + (t * NV + v) * LANES;
      store(out, state[v] * c + (IS_FIRST ? load(skips + v * LANES) * input : load(out)));
    }
  }
  for (int v = 0; v < NV; ++v)
    store(states + v * LANES, state[v]);
}

// Prefetches a tile of the sequence while its time steps are computed: the processor does not foresee rows far apart.
template <int NV, class T>
INLINE void prefetch(const T* x, int64_t stride, int num_rows) {
  for (int i = 0; i < num_rows; ++i)
    for (int v = 0; v < NV; ++v)
      __builtin_prefetch(x + i * stride + v * LANES);
}

template <int NV, bool IS_PART>
INLINE void add_up_skips(const Problem& p, const Block& block, float* skips) {
  for (int v = 0; v < NV; ++v) {
    Vec total{};
    for (int64_t k = 0; k < p.directions; ++k)
      total += load<IS_PART>(p.D_skip + k * p.channels + block.start + v * LANES, block.count);
    store(skips + v * LANES, total);
  }
}

template <class T, int NV, bool IS_PART>
static void scan_block(const Problem& p, int64_t image, const Block& block, float* sums, float* work) {
  const int64_t width = p.width(), share = p.rank + 2 * p.states;
  const T* x = static_cast<const T*>(p.x) + image * p.x_batch + block.start;
  alignas(64) float steps[TILE * NV * LANES], skips[NV * LANES];
  Parameters<NV> parameters(work, p);
  float* states = work;
  add_up_skips<NV, IS_PART>(p, block, skips);
  for (int64_t k = 0; k < p.directions; ++k) {
    parameters.template read<IS_PART>(p, k, block);
    const float* own = p.projection + image * p.length * width + k * share;
    for (int64_t i = 0; i < p.states * NV; ++i)
      store(states + i * LANES, Vec{});
    const int64_t num_tiles = (p.length + TILE - 1) / TILE;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t t = (p.reverse[k] ? num_tiles - 1 - i : i) * TILE;
      const int num_rows = p.length - t < TILE ? p.length - t : TILE;
      const float* rows = own + t * width;
      prefetch<NV>(x + t * p.x_row, p.x_row, num_rows);
      time_steps<NV>(steps, parameters, rows, width, num_rows, p.rank);
      for (int64_t n = 0; n < p.states; ++n) {
        const float* B = rows + p.rank + n;
        const auto run = k + n == 0 ? advance<T, NV, IS_PART, true> : advance<T, NV, IS_PART, false>;
        run(p, x + t * p.x_row, block.count, steps, B, B + p.states, parameters.rate + n * NV * LANES,
            states + n * NV * LANES, skips, sums + t * NV * LANES, num_rows, p.reverse[k]);
      }
    }
  }
}

// Calls `body(channel, address of row 0 in the scratch image, its stride)` for every vector, in order.
template <class Body>
INLINE void for_each_vector(const Problem& p, float* sums, Body body) {
  const int64_t blocks = num_blocks(p.channels);
  for (int64_t i = 0; i < blocks; ++i) {
    const Block block = block_at(p.channels, i);
    const int64_t stride = block.num_vectors * LANES;
    float* rows = sums + block.start * p.length;
    for (int v = 0; v < block.num_vectors; ++v)
      body(block.start + v * LANES, rows + v * LANES, stride);
  }
}

// A few rows of the scratch image side by side, with their mean over the channels and 1 / their standard deviation.
// Several at once: the processor sums one row while another's sum is on its way through its lanes.
struct Rows {
  static constexpr int MOST = 4;
  float mean[MOST], rstd[MOST];
  float* values;  // (MOST, D padded)
  int64_t stride;

  Rows(const Problem& p, float*& work) : values(work), stride(padded(p.channels)) { work += MOST * stride; }

  void read(const Problem& p, const float* sums, int64_t first, int count) {
    const int64_t D = p.channels;
    for (int i = 0; i < count; ++i) {
      float* row = values + i * stride;
      Vec total{};
      for_each_vector(p, const_cast<float*>(sums), [&](int64_t c, const float* rows, int64_t step) {
        const Vec value = load(rows + (first + i) * step);
        store(row + c, value);
        total += value;
      });
      mean[i] = sum(total) / D;
    }
    for (int i = 0; i < count; ++i) {
      const float* row = values + i * stride;
      Vec squares{};
      for_each_channel(D, [&](int64_t c, auto is_part) {
        Vec distance = load(row + c) - mean[i];
        if (is_part.value)
          distance = first_lanes(distance, D - c);
        squares += distance * distance;
      });
      rstd[i] = 1.f / __builtin_sqrtf(sum(squares) / D + p.eps);
    }
  }
};

template <class T>
static void finish_gated(const Problem& p, int64_t image, int64_t first, int64_t last, const float* sums, float* work) {
  const int64_t D = p.channels;
  Rows rows(p, work);
  for (int64_t start = first; start < last; start += Rows::MOST) {
    const int count = last - start < Rows::MOST ? last - start : Rows::MOST;
    rows.read(p, sums, start, count);
    for (int i = 0; i < count; ++i) {
      const float *row = rows.values + i * rows.stride, mean = rows.mean[i], rstd = rows.rstd[i];
      const T* z = static_cast<const T*>(p.z) + image * p.z_batch + (start + i) * p.z_row;
      T* y = static_cast<T*>(p.y) + (image * p.length + start + i) * D;
      for_each_channel(D, [&](int64_t c, auto is_part) {
        constexpr bool part = decltype(is_part)::value;
        const Vec gate = load<part>(z + c, D - c);
        const Vec weight = load<part>(p.norm_weight + c, D - c) * rstd;
        const Vec normed = (load(row + c) - mean) * weight + load<part>(p.norm_bias + c, D - c);
        store<part>(y + c, normed * gate * sigmoid(gate), D - c);
      });
    }
  }
}

static void finish_plain(const Problem& p, int64_t image, int64_t first, int64_t last, const float* sums) {
  const int64_t D = p.channels;
  float* y = static_cast<float*>(p.y) + image * p.length * D;
  for_each_vector(p, const_cast<float*>(sums), [&](int64_t c, const float* rows, int64_t stride) {
    for (int64_t t = first; t < last; ++t)
      if (c + LANES <= D)
        store(y + t * D + c, load(rows + t * stride));
      else
        store_part(y + t * D + c, load(rows + t * stride), D - c);
  });
}

// Calls `body(element, num_vectors, is_part)` with a zero of the elements' type, and with constants.
template <class Body>
INLINE void with_types(const Problem& p, const Block& block, Body body) {
  with_block(block, [&](auto num_vectors, auto is_part) {
    if (p.is_bfloat16)
      body(BFloat16(), num_vectors, is_part);
    else
      body(float(), num_vectors, is_part);
  });
}

// Scans a block of an image: every row of the sum of the directions, into the scratch image.
static void scan(const Problem& p, int64_t image, int64_t index, float* sums, float* work) {
  const Block block = block_at(p.channels, index);
  with_types(p, block, [&](auto element, auto num_vectors, auto is_part) {
    scan_block<decltype(element), num_vectors.value, is_part.value>(
        p, image, block, sums + block.start * p.length, work);
  });
}

// Rows [first, last) of the scratch image to the output, normalised and gated if asked for.
static void finish(const Problem& p, int64_t image, int64_t first, int64_t last, const float* sums, float* work) {
  if (!p.is_gated)
    finish_plain(p, image, first, last, sums);
  else if (p.is_bfloat16)
    finish_gated<BFloat16>(p, image, first, last, sums, work);
  else
    finish_gated<float>(p, image, first, last, sums, work);
}
