// Batch normalisation, and the gradients of depthwise convolutions and of the wavelet branch, for one instruction set.
// Included within its namespace, after cpu_depthwise.h.

constexpr int GROUP = 4;  // rows that share a load and a store of a running sum

// Calls `body(row, count)` for all rows: count<GROUP>, and count<1> for those left over.
template <int VALUE>
struct Count {
  static constexpr int value = VALUE;
};

template <class Body>
INLINE void for_each_group(int64_t rows, Body body) {
  int64_t row = 0;
  for (; row + GROUP <= rows; row += GROUP)
    body(row, Count<GROUP>());
  for (; row < rows; ++row)
    body(row, Count<1>());
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
      for (int i = 0; i < group.value; ++i)
        total += load<is_part.value>(x.at(row + i) + c, count);
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
      const Vec distance = load<is_part.value>(x.at(row) + c, count) - load<is_part.value>(n.mean + c, count);
      Vec value = activate(
          distance * load<is_part.value>(n.scale + c, count) + load<is_part.value>(n.shift + c, count), n.activation);
      if (residual.data)
        value += load<is_part.value>(residual.at(row) + c, count);
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
      const Vec distance = load<is_part.value>(x.at(row) + c, count) - load<is_part.value>(n.mean + c, count);
      const Vec scale = load<is_part.value>(n.scale + c, count), shift = load<is_part.value>(n.shift + c, count);
      const Vec g = through_activation(n, load<is_part.value>(grad.at(row) + c, count), distance, scale, shift);
      const Vec value = scale * g + load<is_part.value>(offset + c, count) +
                        load<is_part.value>(slope + c, count) * distance;
      store<is_part.value>(dx.at(row) + c, value, count);
    });
}

// The transpose of a depthwise convolution: a pixel gathers from those places of the kernel in which it was seen.
template <int NV, bool IS_PART>
static void depthwise_input_row(const DepthwiseGradient& d, int64_t image, int64_t row, const Block& block) {
  const int64_t C = d.x.channels, start = block.start, count = block.count;
  const float* grad = d.grad.data + image * d.grad.image + start;
  for (int64_t column = 0; column < d.dx.width; ++column) {
    const int64_t place = image * d.base.image + row * d.base.row + column * d.base.pixel + start;
    Vec sums[NV] = {};
    if (d.base.data)
      for (int v = 0; v < NV; ++v)
        sums[v] = load<IS_PART>(d.base.data + place + v * LANES, count);
    for (int64_t i = (row + d.padding) % d.stride; i < d.side; i += d.stride) {
      const int64_t y = (row + d.padding - i) / d.stride;
      if (row + d.padding < i || y >= d.grad.height)
        continue;
      for (int64_t j = (column + d.padding) % d.stride; j < d.side; j += d.stride) {
        const int64_t x = (column + d.padding - j) / d.stride;
        if (column + d.padding < j || x >= d.grad.width)
          continue;
        const float* from = grad + y * d.grad.row + x * d.grad.pixel;
        const float* weight = d.weight + (i * d.side + j) * C + start;
        for (int v = 0; v < NV; ++v)
          sums[v] += load<IS_PART>(from + v * LANES, count) * load<IS_PART>(weight + v * LANES, count);
      }
    }
    float* out = d.dx.data + image * d.dx.image + row * d.dx.row + column * d.dx.pixel + start;
    for (int v = 0; v < NV; ++v)
      store<IS_PART>(out + v * LANES, sums[v], count);
  }
}

#define RUN_BLOCK(FUNCTION, block, ...)             \
  if (block.is_part)                                \
    FUNCTION<1, true>(__VA_ARGS__, block);          \
  else if (block.num_vectors == 4)                  \
    FUNCTION<4, false>(__VA_ARGS__, block);         \
  else if (block.num_vectors == 2)                  \
    FUNCTION<2, false>(__VA_ARGS__, block);         \
  else                                              \
    FUNCTION<1, false>(__VA_ARGS__, block);

static void depthwise_input(const DepthwiseGradient& d, int64_t image, int64_t row, int64_t index) {
  const Block block = block_at(d.x.channels, index);
  RUN_BLOCK(depthwise_input_row, block, d, image, row)
}

// TAPS places of the kernel side by side, from (i, j) on.
template <int TAPS, bool IS_PART>
static void add_taps(
    const DepthwiseGradient& d, int64_t image, int64_t i, int64_t j, int64_t channel, int64_t count, float* dweight) {
  const int64_t C = d.x.channels;
  float* to = dweight + (i * d.side + j) * C + channel;
  Vec sums[TAPS];
  for (int t = 0; t < TAPS; ++t)
    sums[t] = load<IS_PART>(to + t * C, count);
  for (int64_t row = 0; row < d.grad.height; ++row) {
    const int64_t y = row * d.stride - d.padding + i;
    if (y < 0 || y >= d.x.height)
      continue;
    const float* grad = d.grad.data + image * d.grad.image + row * d.grad.row + channel;
    const float* x = d.x.data + image * d.x.image + y * d.x.row + channel;
    for (int64_t column = 0; column < d.grad.width; ++column) {
      const Vec g = load<IS_PART>(grad + column * d.grad.pixel, count);
      const int64_t left = column * d.stride - d.padding + j;
#pragma GCC unroll 8
      for (int t = 0; t < TAPS; ++t)
        if (left + t >= 0 && left + t < d.x.width)
          sums[t] += g * load<IS_PART>(x + (left + t) * d.x.pixel, count);
    }
  }
  for (int t = 0; t < TAPS; ++t)
    store<IS_PART>(to + t * C, sums[t], count);
}

template <bool IS_PART>
static void add_all_taps(const DepthwiseGradient& d, int64_t image, int64_t channel, int64_t count, float* dweight) {
  for (int64_t i = 0; i < d.side; ++i)
    if (d.side == 3)
      add_taps<3, IS_PART>(d, image, i, 0, channel, count, dweight);
    else if (d.side == 5)
      add_taps<5, IS_PART>(d, image, i, 0, channel, count, dweight);
    else if (d.side == 7)
      add_taps<7, IS_PART>(d, image, i, 0, channel, count, dweight);
    else
      for (int64_t j = 0; j < d.side; ++j)
        add_taps<1, IS_PART>(d, image, i, j, channel, count, dweight);
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
