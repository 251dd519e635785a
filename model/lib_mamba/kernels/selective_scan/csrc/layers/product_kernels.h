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
      Vec w[NV];
      for (int v = 0; v < NV; ++v)
        w[v] = load(from + v * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < NV; ++v)
          sums[v][r] += w[v] * x[r * stride + k];
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

// As `dense_tile`; in registers are the sums of ROWS numbers of x by NV vectors of grad. IS_PART: the last vector has
// only `count` columns.
template <int ROWS, int NV, bool IS_PART>
NOINLINE void dense_weight_gradient_tile(
    const DenseGradient& d, int64_t row, int64_t column, int64_t count, const Matrix& out) {
  Vec sums[NV][ROWS];
  for_each_sum<ROWS, NV>([&](int v, int r) {
    const float* from = out.at(row + r) + column + v * LANES;
    sums[v][r] = IS_PART && v + 1 == NV ? load_part(from, count) : load(from);
  });
  for (int64_t line = 0; line < d.lines; ++line) {
    const float *x = d.x.data + line * d.x_line + row, *grad = d.grad.data + line * d.grad_line + column;
    for (int64_t k = 0; k < d.count; ++k, x += d.x.stride, grad += d.grad.stride) {
      Vec g[NV];
      for (int v = 0; v < NV; ++v)
        g[v] = IS_PART && v + 1 == NV ? load_part(grad + v * LANES, count) : load(grad + v * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < NV; ++v)
          sums[v][r] += g[v] * x[r];
    }
  }
  for_each_sum<ROWS, NV>([&](int v, int r) {
    float* to = out.at(row + r) + column + v * LANES;
    if (IS_PART && v + 1 == NV)
      store_part(to, sums[v][r], count);
    else
      store(to, sums[v][r]);
  });
}

// Adds the product of the transpose of x with grad to out (depth, columns).
static void dense_weight_gradient(const DenseGradient& d, const Matrix& out) {
  const Panels panels{ceil_div(d.columns, LANES)};
  for_each_tile(d.depth, panels, 0, panels.count(), [&](auto rows, auto vectors, int64_t row, int64_t column) {
    const int64_t left = d.columns - column - (vectors.value - 1) * LANES;
    if (left >= LANES)
      dense_weight_gradient_tile<rows.value, vectors.value, false>(d, row, column, LANES, out);
    else
      dense_weight_gradient_tile<rows.value, vectors.value, true>(d, row, column, left, out);
  });
}
