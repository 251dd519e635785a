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
static void dense_tile(const Dense& d, const float* x, int64_t stride, int64_t row, int64_t column) {
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

typedef void (*DenseTile)(const Dense&, const float*, int64_t, int64_t, int64_t);

template <int NV>
static DenseTile tile_of(int64_t rows) {
#if LANES == 16
  static constexpr DenseTile tiles[] = {
      dense_tile<1, NV>, dense_tile<2, NV>, dense_tile<3, NV>, dense_tile<4, NV>,
      dense_tile<5, NV>, dense_tile<6, NV>, dense_tile<7, NV>, dense_tile<8, NV>};
#else
  static constexpr DenseTile tiles[] = {dense_tile<1, NV>, dense_tile<2, NV>, dense_tile<3, NV>, dense_tile<4, NV>};
#endif
  return tiles[rows - 1];
}

// Threes, and twos where a single one would be left.
static int panel(int64_t left) {
  return left == 1 ? 1 : left == 2 || left == 4 ? 2 : MOST_VECTORS;
}

static void dense(const Dense& d, const float* x, int64_t stride, int64_t rows, int64_t first, int64_t last) {
  const int64_t num_tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int num_vectors; first < last; first += num_vectors) {
    num_vectors = panel(last - first);
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t row = i * rows / num_tiles, count = (i + 1) * rows / num_tiles - row;
      const DenseTile run = num_vectors == 3 ? tile_of<3>(count) : num_vectors == 2 ? tile_of<2>(count) : tile_of<1>(count);
      run(d, x + row * stride, stride, row, first * LANES);
    }
  }
}
