// Batch normalisation, and the gradients of depthwise convolutions and of the wavelet branch, for one instruction set.
// Included within its namespace, after cpu_depthwise.h.

constexpr int GROUP = 4;  // rows that share a load and a store of a running sum

// Calls `body(row, count)` for all rows: GROUP of them, and those left over one by one.
template <class Body>
INLINE void for_each_group(int64_t rows, Body body) {
  int64_t row = 0;
  for (; row + GROUP <= rows; row += GROUP)
    body(row, Constant<GROUP>());
  for (; row < rows; ++row)
    body(row, Constant<1>());
}

// Asks for what a pass over rows comes to soon: the processor itself looks ahead no further than the end of a page.
INLINE void prefetch(const float* from) {
  __builtin_prefetch(from + 1024);
}

INLINE void prefetch_to_write(const float* to) {
  __builtin_prefetch(to + 1024, 1);
}

static void clear(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    values[i] = 0.f;
}

static void moments(const Matrix& x, int64_t rows, int64_t channels, float* mean, float* squares) {
  clear(mean, channels);
  clear(squares, channels);
  for_each_group(rows, [&](int64_t row, auto group) {
    for_each_channel(channels, [&](int64_t c, auto is_part) {
      const int64_t count = channels - c;
      Vec total = load<is_part.value>(mean + c, count);
      for (int i = 0; i < group.value; ++i) {
        prefetch(x.at(row + i) + c);
        total += load<is_part.value>(x.at(row + i) + c, count);
      }
      store<is_part.value>(mean + c, total, count);
    });
  });
  for (int64_t c = 0; c < channels; ++c)
    mean[c] /= rows;
  for_each_group(rows, [&](int64_t row, auto group) {
    for_each_channel(channels, [&](int64_t c, auto is_part) {
      const int64_t count = channels - c;
      const Vec centre = load<is_part.value>(mean + c, count);
      Vec total = load<is_part.value>(squares + c, count);
      for (int i = 0; i < group.value; ++i) {
        const Vec distance = load<is_part.value>(x.at(row + i) + c, count) - centre;
        total += distance * distance;
      }
      store<is_part.value>(squares + c, total, count);
    });
  });
}

static void normalize(
    const Normalization& n, const Matrix& x, const Matrix& residual, const Matrix& out, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    for_each_channel(n.channels, [&](int64_t c, auto is_part) {
      const int64_t count = n.channels - c;
      prefetch(x.at(row) + c);
      prefetch_to_write(out.at(row) + c);
      const Vec distance = load<is_part.value>(x.at(row) + c, count) - load<is_part.value>(n.mean + c, count);
      Vec value = activate(
          distance * load<is_part.value>(n.scale + c, count) + load<is_part.value>(n.shift + c, count), n.activation);
      if (residual.data) {
        prefetch(residual.at(row) + c);
        value += load<is_part.value>(residual.at(row) + c, count);
      }
      store<is_part.value>(out.at(row) + c, value, count);
    });
}

// The gradient before the activation.
INLINE Vec through_activation(const Normalization& n, Vec grad, Vec distance, Vec scale, Vec shift) {
  return n.activation == kRelu ? (Vec)(distance * scale + shift > 0.f & (IntVec)grad) : grad;
}

static void normalize_sums(
    const Normalization& n, const Matrix& grad, const Matrix& x, int64_t rows, float* sums, float* products) {
  clear(sums, n.channels);
  clear(products, n.channels);
  for_each_group(rows, [&](int64_t row, auto group) {
    for_each_channel(n.channels, [&](int64_t c, auto is_part) {
      const int64_t count = n.channels - c;
      const Vec mean = load<is_part.value>(n.mean + c, count), scale = load<is_part.value>(n.scale + c, count);
      const Vec shift = load<is_part.value>(n.shift + c, count);
      Vec sum = load<is_part.value>(sums + c, count), product = load<is_part.value>(products + c, count);
      for (int i = 0; i < group.value; ++i) {
        prefetch(x.at(row + i) + c);
        prefetch(grad.at(row + i) + c);
        const Vec distance = load<is_part.value>(x.at(row + i) + c, count) - mean;
        const Vec g =
            through_activation(n, load<is_part.value>(grad.at(row + i) + c, count), distance, scale, shift);
        sum += g;
        product += g * distance;
      }
      store<is_part.value>(sums + c, sum, count);
      store<is_part.value>(products + c, product, count);
    });
  });
}

static void normalize_backward(
    const Normalization& n, const float* offset, const float* slope, const Matrix& grad, const Matrix& x,
    const Matrix& dx, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    for_each_channel(n.channels, [&](int64_t c, auto is_part) {
      const int64_t count = n.channels - c;
      prefetch(x.at(row) + c);
      prefetch(grad.at(row) + c);
      const Vec distance = load<is_part.value>(x.at(row) + c, count) - load<is_part.value>(n.mean + c, count);
      const Vec scale = load<is_part.value>(n.scale + c, count), shift = load<is_part.value>(n.shift + c, count);
      const Vec g = through_activation(n, load<is_part.value>(grad.at(row) + c, count), distance, scale, shift);
      const Vec value = scale * g + load<is_part.value>(offset + c, count) +
                        load<is_part.value>(slope + c, count) * distance;
      store<is_part.value>(dx.at(row) + c, value, count);
    });
}

// The places of a kernel in which a row or column of pixels was seen: `first + n * stride` by the output's pixel
// `pixel - n`, for n in [begin, end).
struct Places {
  int64_t first, pixel, begin, end;

  Places(int64_t position, int64_t padding, int64_t stride, int64_t side, int64_t outputs)
      : first((position + padding) % stride), pixel((position + padding) / stride),
        begin(pixel < outputs ? 0 : pixel - outputs + 1) {
    const int64_t count = (side - first + stride - 1) / stride;
    end = count < pixel + 1 ? count : pixel + 1;
  }
};

// COUNT pixels of dx side by side, seen in the same places of the kernel: with a stride, one.
template <int NV, int COUNT, bool IS_PART>
INLINE void depthwise_input_pixels(
    const DepthwiseGradient& d, int64_t image, int64_t row, int64_t column, int64_t stride, const Places& rows,
    const Places& columns, int64_t start, int64_t count) {
  const int64_t C = d.x.channels;
  Vec sums[COUNT][NV] = {};
  if (d.base.data) {
    const float* base = d.base.data + image * d.base.image + row * d.base.row + column * d.base.pixel + start;
    for (int p = 0; p < COUNT; ++p)
      for (int v = 0; v < NV; ++v)
        sums[p][v] = load<IS_PART>(base + p * d.base.pixel + v * LANES, count);
  }
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    const float* grad = d.grad.data + image * d.grad.image + (rows.pixel - n) * d.grad.row +
                        columns.pixel * d.grad.pixel + start;
    const float* weights = d.weight + ((rows.first + n * stride) * d.side + columns.first) * C + start;
    for (int64_t m = columns.begin; m < columns.end; ++m)
      for (int v = 0; v < NV; ++v) {
        const Vec w = load<IS_PART>(weights + m * stride * C + v * LANES, count);
        for (int p = 0; p < COUNT; ++p)
          sums[p][v] += load<IS_PART>(grad + (p - m) * d.grad.pixel + v * LANES, count) * w;
      }
  }
  float* out = d.dx.data + image * d.dx.image + row * d.dx.row + column * d.dx.pixel + start;
  for (int p = 0; p < COUNT; ++p)
    for (int v = 0; v < NV; ++v)
      store<IS_PART>(out + p * d.dx.pixel + v * LANES, sums[p][v], count);
}

// The transpose of a depthwise convolution. STRIDE 0: any.
template <int STRIDE, int NV, bool IS_PART>
static void depthwise_input_row(const DepthwiseGradient& d, int64_t image, int64_t row, const Block& block) {
  const int64_t stride = STRIDE ? STRIDE : d.stride;
  const Places rows(row, d.padding, stride, d.side, d.grad.height);
  for (int64_t column = 0; column < d.dx.width;) {
    const Places columns(column, d.padding, stride, d.side, d.grad.width);
    const bool is_inside = column + d.padding + 1 >= d.side && column + PIXELS + d.padding <= d.grad.width;
    if (STRIDE == 1 && is_inside) {
      depthwise_input_pixels<NV, PIXELS, IS_PART>(
          d, image, row, column, stride, rows, columns, block.start, block.count);
      column += PIXELS;
    } else {
      depthwise_input_pixels<NV, 1, IS_PART>(d, image, row, column, stride, rows, columns, block.start, block.count);
      column += 1;
    }
  }
}

template <int STRIDE>
static void depthwise_input_block(const DepthwiseGradient& d, int64_t image, int64_t row, const Block& block) {
  const auto run = block.is_part              ? depthwise_input_row<STRIDE, 1, true>
                   : block.num_vectors == 4   ? depthwise_input_row<STRIDE, 4, false>
                   : block.num_vectors == 2   ? depthwise_input_row<STRIDE, 2, false>
                                              : depthwise_input_row<STRIDE, 1, false>;
  run(d, image, row, block);
}

static void depthwise_input(const DepthwiseGradient& d, int64_t image, int64_t row, int64_t index) {
  const auto run = d.stride == 1 ? depthwise_input_block<1> : depthwise_input_block<0>;
  run(d, image, row, block_at(d.x.channels, index));
}

// ROWS by TAPS places of the kernel, from (i, j) on, for a row of the gradient whose pixels are seen there.
template <int ROWS, int TAPS, bool IS_PART, bool IS_BORDER>
INLINE void add_pixel(
    Vec (&sums)[ROWS][TAPS], Vec g, const float* x, const Map& map, int64_t top, int64_t left, int64_t count) {
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < TAPS; ++t) {
      const bool is_inside = top + i >= 0 && top + i < map.height && left + t >= 0 && left + t < map.width;
      if (!IS_BORDER || is_inside)
        sums[i][t] += g * load<IS_PART>(x + (top + i) * map.row + (left + t) * map.pixel, count);
    }
}

template <int ROWS, int TAPS, bool IS_PART>
static void add_taps(
    const DepthwiseGradient& d, int64_t image, int64_t i, int64_t j, int64_t channel, int64_t count, float* dweight) {
  const int64_t C = d.x.channels;
  float* to = dweight + (i * d.side + j) * C + channel;
  const float* x = d.x.data + image * d.x.image + channel;
  Vec sums[ROWS][TAPS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TAPS; ++t)
      sums[r][t] = load<IS_PART>(to + (r * d.side + t) * C, count);
  for (int64_t row = 0; row < d.grad.height; ++row) {
    const int64_t top = row * d.stride - d.padding + i;
    if (top + ROWS <= 0 || top >= d.x.height)
      continue;
    const bool is_border = top < 0 || top + ROWS > d.x.height;
    const float* grad = d.grad.data + image * d.grad.image + row * d.grad.row + channel;
    for (int64_t column = 0; column < d.grad.width; ++column) {
      const Vec g = load<IS_PART>(grad + column * d.grad.pixel, count);
      const int64_t left = column * d.stride - d.padding + j;
      if (is_border || left < 0 || left + TAPS > d.x.width)
        add_pixel<ROWS, TAPS, IS_PART, true>(sums, g, x, d.x, top, left, count);
      else
        add_pixel<ROWS, TAPS, IS_PART, false>(sums, g, x, d.x, top, left, count);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TAPS; ++t)
      store<IS_PART>(to + (r * d.side + t) * C, sums[r][t], count);
}

template <bool IS_PART>
static void add_all_taps(const DepthwiseGradient& d, int64_t image, int64_t channel, int64_t count, float* dweight) {
  if (d.side == 3) {
    add_taps<3, 3, IS_PART>(d, image, 0, 0, channel, count, dweight);
    return;
  }
  for (int64_t i = 0; i < d.side; ++i)
    if (d.side == 5)
      add_taps<1, 5, IS_PART>(d, image, i, 0, channel, count, dweight);
    else if (d.side == 7)
      add_taps<1, 7, IS_PART>(d, image, i, 0, channel, count, dweight);
    else
      for (int64_t j = 0; j < d.side; ++j)
        add_taps<1, 1, IS_PART>(d, image, i, j, channel, count, dweight);
}

static void depthwise_taps(const DepthwiseGradient& d, int64_t image, int64_t index, float* dweight) {
  const Block block = block_at(d.x.channels, index);
  if (block.is_part) {
    add_all_taps<true>(d, image, block.start, block.count, dweight);
    return;
  }
  for (int v = 0; v < block.num_vectors; ++v)
    add_all_taps<false>(d, image, block.start + v * LANES, LANES, dweight);
}

// The bands of the gradient times those of x around them, in the cache as those of `wavelet`.
template <int TAPS, bool IS_PART>
INLINE void add_band_taps(
    const Bands& bands, const float* grad, const float* x, int64_t i, int64_t j, int64_t stride, int64_t count,
    float* to) {
  for (int n = 0; n < BANDS; ++n, to += stride) {
    Vec sums[TAPS];
    for (int t = 0; t < TAPS; ++t)
      sums[t] = load<IS_PART>(to + t * BANDS * stride, count);
    for (int64_t row = 0; row < bands.height; ++row)
      for (int64_t column = 0; column < bands.width; ++column) {
        const Vec g = load(grad + bands.at(row + bands.reach, column + bands.reach) + n * LANES);
        const float* from = x + bands.at(row + i, column + j) + n * LANES;
        for (int t = 0; t < TAPS; ++t)
          sums[t] += g * load(from + t * BANDS * LANES);
      }
    for (int t = 0; t < TAPS; ++t)
      store<IS_PART>(to + t * BANDS * stride, sums[t], count);
  }
}

template <bool IS_PART>
static void wavelet_taps_channels(
    const WaveletGradient& w, int64_t image, int64_t channel, int64_t count, float* dweight, float* work) {
  const Bands bands(w.x.height, w.x.width, w.side);
  float *x = work, *grad = work + bands.size();
  transform<IS_PART>(w.x, bands, image, channel, count, x);
  transform<IS_PART>(w.grad, bands, image, channel, count, grad);
  const int64_t C = w.x.channels;
  for (int64_t i = 0; i < w.side; ++i) {
    float* to = dweight + i * w.side * BANDS * C + channel;
    if (w.side == 3)
      add_band_taps<3, IS_PART>(bands, grad, x, i, 0, C, count, to);
    else if (w.side == 5)
      add_band_taps<5, IS_PART>(bands, grad, x, i, 0, C, count, to);
    else if (w.side == 7)
      add_band_taps<7, IS_PART>(bands, grad, x, i, 0, C, count, to);
    else
      for (int64_t j = 0; j < w.side; ++j)
        add_band_taps<1, IS_PART>(bands, grad, x, i, j, C, count, to + j * BANDS * C);
  }
}

static void wavelet_taps(const WaveletGradient& w, int64_t image, int64_t channel, float* dweight, float* work) {
  const int64_t count = w.x.channels - channel;
  if (count >= LANES)
    wavelet_taps_channels<false>(w, image, channel, LANES, dweight, work);
  else
    wavelet_taps_channels<true>(w, image, channel, count, dweight, work);
}

// As in `dense_tile`: what is held in registers here are the sums of ROWS numbers of x by NV vectors of grad.
template <int ROWS, int NV>
NOINLINE void dense_weight_tile(const DenseGradient& d, int64_t row, int64_t column, const Matrix& out) {
  Vec sums[NV][ROWS];
  for_each_sum<ROWS, NV>([&](int v, int r) { sums[v][r] = load(out.at(row + r) + column + v * LANES); });
  for (int64_t line = 0; line < d.lines; ++line) {
    const float *x = d.x.data + line * d.x_line + row, *grad = d.grad.data + line * d.grad_line + column;
    for (int64_t k = 0; k < d.count; ++k, x += d.x.stride, grad += d.grad.stride) {
      Vec g[NV];
      for (int v = 0; v < NV; ++v)
        g[v] = load(grad + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < NV; ++v)
          sums[v][r] += g[v] * x[r];
    }
  }
  for_each_sum<ROWS, NV>([&](int v, int r) { store(out.at(row + r) + column + v * LANES, sums[v][r]); });
}

static void dense_weight(const DenseGradient& d, const Matrix& out) {
  for_each_tile(d.depth, 0, d.vectors, [&](auto rows, auto vectors, int64_t row, int64_t column) {
    dense_weight_tile<rows.value, vectors.value>(d, row, column, out);
  });
}
