// Products of rows with a matrix, and the gradient of the matrix. Included once for each instruction set, after
// cpu/channels.h.
//
// A tile of rows by vectors of columns is held in registers while it runs through the depth: every weight that is
// loaded serves all rows of the tile, every number of a row all its columns.

#if LANES == 16 || defined(__aarch64__)
constexpr int MOST_SUMS = 24;  // and 3 weights, 1 number in 32 registers
#else
constexpr int MOST_SUMS = 12;  // and 3 weights, 1 number in 16 registers
#endif

// As many as keep both units for multiplication busy while a sum waits for its last product.
constexpr int most_rows(int num_vectors) {
  return MOST_SUMS / (num_vectors > 2 ? num_vectors : 2);
}

// Activation and residual in place, where they take more registers than the sums leave.
NOINLINE void finish_rows(const Dense& d, int64_t row, int64_t rows, int64_t column, int64_t count) {
  for (int64_t end = row + rows; row < end; ++row)
    for (int64_t i = 0; i < count; i += LANES) {
      float* out = d.out + row * d.out_row + column + i;
      const int64_t left = count - i < LANES ? count - i : LANES;
      Vec value = activate(load_part(out, left), d.activation);
      if (d.residual)
        value += load_part(d.residual + row * d.residual_row + column + i, left);
      store_part(out, value, left);
    }
}

// IS_PART: the last vector has only `count` columns.
template <int ROWS, int NV, bool IS_PART>
INLINE void finish_tile(const Dense& d, Vec (&sums)[NV][ROWS], int64_t row, int64_t column, int64_t count) {
  float* out = d.out + row * d.out_row + column;
  const bool is_silu = d.activation == kSilu;
  if (d.activation == kRelu)
    for_each_sum<ROWS, NV>([&](int v, int r) { sums[v][r] = at_least(sums[v][r], 0.f); });
  if (d.residual && !is_silu) {
    const float* residual = d.residual + row * d.residual_row + column;
    for_each_sum<ROWS, NV>([&](int v, int r) {
      const float* from = residual + r * d.residual_row + v * LANES;
      sums[v][r] += IS_PART && v + 1 == NV ? load_part(from, count) : load(from);
    });
  }
  for_each_sum<ROWS, NV>([&](int v, int r) {
    float* to = out + r * d.out_row + v * LANES;
    if (IS_PART && v + 1 == NV)
      store_part(to, sums[v][r], count);
    else
      store(to, sums[v][r]);
  });
  if (is_silu)
    finish_rows(d, row, ROWS, column, (NV - 1) * LANES + count);
}

// Memory to fetch while a tile is made: so many floats for each step through the depth.
struct Ahead {
  const float* from;
  int64_t step;
};

// Adds the products of NV vectors with the numbers of ROWS rows, `stride` apart.
template <int ROWS, int NV>
INLINE void add_products(Vec (&sums)[NV][ROWS], const float* vectors, const float* x, int64_t stride) {
  Vec own[NV];
  for (int v = 0; v < NV; ++v)
    own[v] = load(vectors + v * LANES);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < NV; ++v)
      sums[v][r] += own[v] * x[r * stride];
}

// `weight` is the first row's, in its panel.
template <int ROWS, int NV>
NOINLINE void dense_tile(
    const Dense& d, const float* weight, Ahead ahead, const float* x, int64_t stride, int64_t row, int64_t column) {
  constexpr int64_t width = NV * LANES;
  // The processor does not foresee where the tile will be stored; there is time to fetch it while the sums are made.
  const float* out = d.out + row * d.out_row + column;
  for_each_sum<ROWS, NV>([&](int v, int r) { __builtin_prefetch(out + r * d.out_row + v * LANES, 1); });
  if (d.residual) {
    const float* residual = d.residual + row * d.residual_row + column;
    for_each_sum<ROWS, NV>([&](int v, int r) { __builtin_prefetch(residual + r * d.residual_row + v * LANES); });
  }
  const int64_t left = d.columns - column - (NV - 1) * LANES;
  Vec sums[NV][ROWS];
  for_each_sum<ROWS, NV>([&](int v, int r) {
    const float* bias = d.bias + column + v * LANES;
    sums[v][r] = r ? sums[v][0] : v + 1 < NV || left >= LANES ? load(bias) : load_part(bias, left);
  });
  for (int64_t piece = 0; piece < d.pieces; ++piece, x += d.piece_stride, weight += d.piece_rows * width) {
    const float* from = weight;
    for (int64_t k = 0; k < d.depth; ++k, from += width, ahead.from += ahead.step) {
      __builtin_prefetch(ahead.from);
      add_products(sums, from, x + k, stride);
    }
  }
  if (left >= LANES)
    finish_tile<ROWS, NV, false>(d, sums, row, column, LANES);
  else
    finish_tile<ROWS, NV, true>(d, sums, row, column, left);
}

// Calls `body(count)` with a count of up to MOST rows as a constant.
template <int MOST, class Body>
INLINE void with_rows(int64_t count, Body body) {
  if constexpr (MOST > 1)
    if (count < MOST)
      return with_rows<MOST - 1>(count, body);
  body(Constant<MOST>());
}

// Calls `body(rows, vectors, row, column)` for the tiles of all rows, with their sizes as constants.
template <int NV, class Body>
INLINE void for_each_tile_of(int64_t rows, int64_t column, Body body) {
  const int64_t num_tiles = ceil_div(rows, most_rows(NV));
  for (int64_t i = 0; i < num_tiles; ++i) {
    const int64_t row = i * rows / num_tiles, size = (i + 1) * rows / num_tiles - row;
    with_rows<most_rows(NV)>(size, [&](auto count) { body(count, Constant<NV>(), row, column); });
  }
}

// Calls `body(rows, vectors, row, column)` for the tiles of all rows and of panels [first, last): their sizes, and
// where they begin.
template <class Body>
INLINE void for_each_tile(int64_t rows, const Panels& panels, int64_t first, int64_t last, Body body) {
  for (int64_t panel = first; panel < last; ++panel) {
    const Columns vectors = panels[panel];
    if (vectors.count == 3)
      for_each_tile_of<3>(rows, vectors.start * LANES, body);
    else if (vectors.count == 2)
      for_each_tile_of<2>(rows, vectors.start * LANES, body);
    else
      for_each_tile_of<1>(rows, vectors.start * LANES, body);
  }
}

// Rows of x, `stride` apart, times the columns in panels [first, last); row 0 belongs to row 0 of the output.
static void dense(const Dense& d, const float* x, int64_t stride, int64_t rows, int64_t first, int64_t last) {
  const Panels panels{ceil_div(d.columns, LANES)};
  for_each_tile(rows, panels, first, last, [&](auto size, auto vectors, int64_t row, int64_t column) {
    constexpr int64_t width = vectors.value * LANES;
    const float* weight = d.weight.data + column * d.weight.rows + d.first_row * width;
    // The next panel follows. All tiles of this one together fetch it: the processor's own prefetching stops at the end
    // of every page.
    const Ahead ahead{weight + (d.weight.rows * rows + d.depth * row) * width / rows, width * size.value / rows};
    dense_tile<size.value, vectors.value>(d, weight, ahead, x + row * stride, stride, row, column);
  });
}

// The gradient of a weight: both maps are copied a block of pixels at a time, so that the numbers of a tile lie side by
// side. In the maps, pixels lie so far apart that each takes a page of its own, and many of them share lines of the
// cache.

// Pixels of a block, so that a panel of grad takes 12 KB of the first-level cache; and panels of a block, so that they
// take 192 KB of the second-level one.
constexpr int64_t GRADIENT_PIXELS = 1024 / LANES, GRADIENT_PANELS = 16;

// Floats between the copied pixels of x: an odd number of the cache's lines, so that the pixels fall into all of them.
INLINE int64_t gradient_stride(int64_t depth) {
  return (ceil_div(depth, ROUND) | 1) * ROUND;
}

static int64_t dense_weight_gradient_work_size(int64_t depth, int64_t columns) {
  const int64_t vectors = ceil_div(columns, LANES), most = GRADIENT_PANELS * Panels::kWidest;
  return GRADIENT_PIXELS * (gradient_stride(depth) + (vectors < most ? vectors : most) * LANES);
}

// As many pixels of both maps, by address.
struct GradientPixels {
  int64_t count = 0;
  const float *x[GRADIENT_PIXELS], *grad[GRADIENT_PIXELS];

  GradientPixels(const DenseGradient& d, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i, ++count) {
      const int64_t line = i / d.count, k = i % d.count;
      x[count] = d.x.at(k) + line * d.x_line;
      grad[count] = d.grad.at(k) + line * d.grad_line;
    }
  }

  void copy_x(int64_t depth, float* to) const {
    for (int64_t i = 0; i < count; ++i, to += gradient_stride(depth))
      for_each_channel(
          depth, [&](int64_t c, auto is_part) { store(to + c, load<is_part.value>(x[i] + c, depth - c)); });
  }

  // Pixels [begin, end) of vectors of columns; the last one may have only `left` of them, and zeros.
  template <int NV>
  void copy_vectors(int64_t begin, int64_t end, int64_t column, int64_t left, float* to) const {
    for (int64_t i = begin; i < end; ++i, to += NV * LANES) {
      const float* from = grad[i] + column;
      for (int v = 0; v + 1 < NV; ++v)
        store(to + v * LANES, load(from + v * LANES));
      const float* last = from + (NV - 1) * LANES;
      store(to + (NV - 1) * LANES, left >= LANES ? load(last) : load_part(last, left));
    }
  }

  // Panels [first, last), one behind the other, columns padded with zeros to whole vectors.
  void copy_grad(const Panels& panels, int64_t first, int64_t last, int64_t columns, float* to) const {
    constexpr int64_t few = 8;  // pixels at a time: the processor prefetches that many sequences
    const int64_t start = panels[first].start * LANES;
    for (int64_t begin = 0; begin < count; begin += few)
      for (int64_t panel = first; panel < last; ++panel) {
        const Columns vectors = panels[panel];
        const int64_t column = vectors.start * LANES, width = vectors.count * LANES;
        const int64_t end = begin + few < count ? begin + few : count, left = columns - column - width + LANES;
        float* row = to + (column - start) * count + begin * width;
        if (vectors.count == 3)
          copy_vectors<3>(begin, end, column, left, row);
        else if (vectors.count == 2)
          copy_vectors<2>(begin, end, column, left, row);
        else
          copy_vectors<1>(begin, end, column, left, row);
      }
  }
};

// IS_PART: the last vector has only `count` columns.
template <int ROWS, int NV, bool IS_PART>
INLINE void add_tile(Vec (&sums)[NV][ROWS], float* out, int64_t stride, int64_t count) {
  for_each_sum<ROWS, NV>([&](int v, int r) {
    float* to = out + r * stride + v * LANES;
    if (IS_PART && v + 1 == NV)
      store_part(to, load_part(to, count) + sums[v][r], count);
    else
      store(to, load(to) + sums[v][r]);
  });
}

// As `dense_tile`; in registers are the sums of ROWS numbers of x by NV vectors of grad. They are added to `out`, whose
// last vector has `count` columns.
template <int ROWS, int NV>
NOINLINE void dense_weight_gradient_tile(
    const float* x, int64_t x_stride, const float* grad, int64_t pixels, float* out, int64_t stride, int64_t count) {
  for_each_sum<ROWS, NV>([&](int v, int r) { __builtin_prefetch(out + r * stride + v * LANES, 1); });
  Vec sums[NV][ROWS];
  for_each_sum<ROWS, NV>([&](int v, int r) { sums[v][r] = Vec{}; });
  for (int64_t k = 0; k < pixels; ++k, x += x_stride, grad += NV * LANES)
    add_products(sums, grad, x, 1);
  if (count >= LANES)
    add_tile<ROWS, NV, false>(sums, out, stride, LANES);
  else
    add_tile<ROWS, NV, true>(sums, out, stride, count);
}

// Adds the product of the transpose of x with grad to out (depth, columns).
static void dense_weight_gradient(const DenseGradient& d, const Matrix& out, float* work) {
  const Panels panels{ceil_div(d.columns, LANES)};
  const int64_t pixels = d.lines * d.count, blocks = ceil_div(pixels, GRADIENT_PIXELS);
  const int64_t stride = gradient_stride(d.depth);
  float *x = work, *grad = work + GRADIENT_PIXELS * stride;
  for (int64_t block = 0; block < blocks; ++block) {
    const GradientPixels block_pixels(d, block * pixels / blocks, (block + 1) * pixels / blocks);
    const int64_t size = block_pixels.count;
    block_pixels.copy_x(d.depth, x);
    for (int64_t first = 0; first < panels.count(); first += GRADIENT_PANELS) {
      const int64_t start = panels[first].start * LANES;
      const int64_t last = first + GRADIENT_PANELS < panels.count() ? first + GRADIENT_PANELS : panels.count();
      block_pixels.copy_grad(panels, first, last, d.columns, grad);
      for_each_tile(d.depth, panels, first, last, [&](auto rows, auto vectors, int64_t row, int64_t column) {
        dense_weight_gradient_tile<rows.value, vectors.value>(
            x + row, stride, grad + (column - start) * size, size, out.at(row) + column, out.stride,
            d.columns - column - (vectors.value - 1) * LANES);
      });
    }
  }
}

// A panel of a weight: a matrix of `rows` by `columns`, padded with zeros to `width` columns.
static void pack_panel(const Matrix& from, int64_t rows, int64_t columns, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row, to += width)
    for (int64_t c = 0; c < width; c += LANES)
      store(to + c, c + LANES <= columns ? load(from.at(row) + c) : load_part(from.at(row) + c, columns - c));
}

// The same of the transpose of a matrix of `columns` by `rows`.
static void pack_transposed_panel(const Matrix& from, int64_t rows, int64_t columns, int64_t width, float* to) {
  const int64_t whole_rows = rows / ROUND * ROUND, whole_columns = columns / LANES * LANES;
  for (int64_t row = 0; row < whole_rows; row += ROUND)
    for (int64_t c = 0; c < whole_columns; c += LANES)
      for (int64_t i = row; i < row + ROUND; i += LANES)
        transpose(from.at(c) + i, from.stride, to + i * width + c, width, LANES);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = row < whole_rows ? whole_columns : 0; c < width; ++c)
      to[row * width + c] = c < columns ? from.at(c)[row] : 0.f;
}
