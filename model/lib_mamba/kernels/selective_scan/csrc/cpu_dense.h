// Products of rows with a matrix, for one instruction set. Included within its namespace, after cpu_vector.h.
//
// A tile of rows by vectors of columns is held in registers while it runs through the depth: every weight that is
// loaded serves all rows of the tile, every number of a row all its columns.

#if LANES == 16
constexpr int MOST_ROWS = 8;  // with three vectors: 24 sums, 3 weights, 1 number in 32 registers
#else
constexpr int MOST_ROWS = 4;  // 12 sums, 3 weights, 1 number in 16 registers
#endif
constexpr int MOST_VECTORS = 3;

INLINE Vec activate(Vec value, Activation activation) {
  if (activation == kRelu)
    return at_least(value, 0.f);
  return activation == kSilu ? value * sigmoid(value) : value;
}

template <bool IS_PART, int ROWS>
INLINE void finish_column(const Dense& d, const Vec (&sums)[ROWS], int64_t row, int64_t column, int64_t count) {
  const Vec bias = load<IS_PART>(d.bias + column, count);
  for (int r = 0; r < ROWS; ++r) {
    Vec value = activate(sums[r] + bias, d.activation);
    if (d.residual)
      value += load<IS_PART>(d.residual + (row + r) * d.residual_row + column, count);
    store<IS_PART>(d.out + (row + r) * d.out_row + column, value, count);
  }
}

template <int ROWS, int NV>
NOINLINE void dense_tile(const Dense& d, const float* x, int64_t stride, int64_t row, int64_t column) {
  // The processor does not foresee where the tile will be stored; there is time to fetch it while the sums are made.
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < NV; ++v) {
      __builtin_prefetch(d.out + (row + r) * d.out_row + column + v * LANES, 1);
      if (d.residual)
        __builtin_prefetch(d.residual + (row + r) * d.residual_row + column + v * LANES);
    }
  Vec sums[NV][ROWS] = {};
  for (int64_t piece = 0; piece < d.pieces; ++piece, x += d.piece_stride) {
    const float* weight = d.weight + piece * d.weight_stride + column;
    for (int64_t k = 0; k < d.depth; ++k, weight += d.width) {
      Vec w[NV];
      for (int v = 0; v < NV; ++v)
        w[v] = load(weight + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < NV; ++v)
          sums[v][r] += w[v] * x[r * stride + k];
    }
  }
  for (int v = 0; v < NV; ++v, column += LANES) {
    const int64_t count = d.columns - column;
    if (count >= LANES)
      finish_column<false>(d, sums[v], row, column, LANES);
    else
      finish_column<true>(d, sums[v], row, column, count);
  }
}

// Threes, and twos where a single one would be left.
static int panel(int64_t left) {
  return left == 1 ? 1 : left == 2 || left == 4 ? 2 : MOST_VECTORS;
}

template <int NV, class Body>
INLINE void with_tile(int64_t rows, int64_t row, int64_t column, Body body) {
  switch (rows) {
    case 1: return body(Constant<1>(), Constant<NV>(), row, column);
    case 2: return body(Constant<2>(), Constant<NV>(), row, column);
    case 3: return body(Constant<3>(), Constant<NV>(), row, column);
    case 4: return body(Constant<4>(), Constant<NV>(), row, column);
#if LANES == 16
    case 5: return body(Constant<5>(), Constant<NV>(), row, column);
    case 6: return body(Constant<6>(), Constant<NV>(), row, column);
    case 7: return body(Constant<7>(), Constant<NV>(), row, column);
    case 8: return body(Constant<8>(), Constant<NV>(), row, column);
#endif
  }
}

// Calls `body(rows, vectors, row, column)` for the tiles of all rows and of vectors [first, last): their sizes, and where
// they begin.
template <class Body>
INLINE void for_each_tile(int64_t rows, int64_t first, int64_t last, Body body) {
  const int64_t num_tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int vectors; first < last; first += vectors) {
    vectors = panel(last - first);
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t row = i * rows / num_tiles, size = (i + 1) * rows / num_tiles - row;
      if (vectors == 3)
        with_tile<3>(size, row, first * LANES, body);
      else if (vectors == 2)
        with_tile<2>(size, row, first * LANES, body);
      else
        with_tile<1>(size, row, first * LANES, body);
    }
  }
}

static void dense(const Dense& d, const float* x, int64_t stride, int64_t rows, int64_t first, int64_t last) {
  for_each_tile(rows, first, last, [&](auto size, auto vectors, int64_t row, int64_t column) {
    dense_tile<size.value, vectors.value>(d, x + row * stride, stride, row, column);
  });
}
