// Depthwise convolutions and the wavelet branch, for one instruction set. Included within its namespace, after
// cpu_dense.h.

constexpr int PIXELS = LANES == 16 ? 4 : 2;  // side by side, as registers allow: a weight that is loaded serves them all

// COUNT pixels of the output from (row, column) on, a block of channels: places [first_x, last_x) of the kernel's rows.
template <int NV, int COUNT, bool IS_PART>
INLINE void depthwise_pixels(
    const Depthwise& d, int64_t image, int64_t row, int64_t column, int64_t first_x, int64_t last_x, int64_t start,
    int64_t count) {
  const int64_t C = d.x.channels, top = row * d.stride - d.padding, left = column * d.stride - d.padding;
  const int64_t first_y = top < 0 ? -top : 0, last_y = top + d.side > d.x.height ? d.x.height - top : d.side;
  const int64_t step = d.stride * d.x.pixel;
  Vec sums[COUNT][NV];
  for (int v = 0; v < NV; ++v)
    for (int p = 0; p < COUNT; ++p)
      sums[p][v] = load<IS_PART>(d.bias + start + v * LANES, count);
  for (int64_t i = first_y; i < last_y; ++i)
    for (int64_t j = first_x; j < last_x; ++j) {
      const float* from = d.x.data + image * d.x.image + (top + i) * d.x.row + (left + j) * d.x.pixel + start;
      const float* weight = d.weight + (i * d.side + j) * C + start;
      for (int v = 0; v < NV; ++v) {
        const Vec w = load<IS_PART>(weight + v * LANES, count);
        for (int p = 0; p < COUNT; ++p)
          sums[p][v] += load<IS_PART>(from + p * step + v * LANES, count) * w;
      }
    }
  float* out = d.out.data + image * d.out.image + row * d.out.row + column * d.out.pixel + start;
  for (int p = 0; p < COUNT; ++p, out += d.out.pixel)
    for (int v = 0; v < NV; ++v) {
      Vec value = activate(sums[p][v], d.activation);
      if (d.scale)
        value = value * load<IS_PART>(d.scale + start + v * LANES, count) +
                load<IS_PART>(d.shift + start + v * LANES, count);
      store<IS_PART>(out + v * LANES, value, count);
    }
}

template <int NV, bool IS_PART>
static void depthwise_row(const Depthwise& d, int64_t image, int64_t row, const Block& block) {
  for (int64_t column = 0; column < d.out.width;) {
    const int64_t left = column * d.stride - d.padding, reach = (PIXELS - 1) * d.stride + d.side;
    if (left >= 0 && left + reach <= d.x.width) {
      depthwise_pixels<NV, PIXELS, IS_PART>(d, image, row, column, 0, d.side, block.start, block.count);
      column += PIXELS;
      continue;
    }
    const int64_t first_x = left < 0 ? -left : 0, last_x = left + d.side > d.x.width ? d.x.width - left : d.side;
    depthwise_pixels<NV, 1, IS_PART>(d, image, row, column, first_x, last_x, block.start, block.count);
    column += 1;
  }
}

static void depthwise(const Depthwise& d, int64_t image, int64_t row, int64_t index) {
  const Block block = block_at(d.x.channels, index);
  const auto run = block.is_part              ? depthwise_row<1, true>
                   : block.num_vectors == 4   ? depthwise_row<4, false>
                   : block.num_vectors == 2   ? depthwise_row<2, false>
                                              : depthwise_row<1, false>;
  run(d, image, row, block);
}

constexpr int BANDS = 4;

// The four Haar bands, in the order of the checkpoints' filters, of a square of pixels 0 1 / 2 3. The same sums take the
// bands back to pixels.
INLINE void haar(Vec (&square)[BANDS]) {
  const Vec top = (square[0] + square[1]) * 0.5f, across = (square[0] - square[1]) * 0.5f;
  const Vec bottom = (square[2] + square[3]) * 0.5f, below = (square[2] - square[3]) * 0.5f;
  square[0] = top + bottom;
  square[1] = top - bottom;
  square[2] = across + below;
  square[3] = across - below;
}

// The bands of an image, with zeros around them as wide as the kernel reaches: (rows, columns, BANDS, LANES).
struct Bands {
  int64_t height, width, reach, columns;

  Bands(int64_t map_height, int64_t map_width, int64_t side)
      : height((map_height + 1) / 2), width((map_width + 1) / 2), reach(side / 2), columns(width + 2 * reach) {}

  int64_t size() const {
    return (height + 2 * reach) * columns * BANDS * LANES;
  }

  int64_t at(int64_t row, int64_t column) const {
    return (row * columns + column) * BANDS * LANES;
  }
};

// Bands and weights; or for the weights' gradient, bands twice.
static int64_t wavelet_work_size(int64_t height, int64_t width, int64_t side) {
  const int64_t size = Bands(height, width, side).size(), weights = side * side * BANDS * LANES;
  return rounded(size + (size > weights ? size : weights));
}

template <bool IS_PART>
INLINE void transform(
    const Map& map, const Bands& bands, int64_t image, int64_t channel, int64_t count, float* to) {
  const float* x = map.data + image * map.image + channel;
  for (int64_t i = 0; i < bands.size(); i += LANES)
    store(to + i, Vec{});
  for (int64_t i = 0; i < bands.height; ++i)
    for (int64_t j = 0; j < bands.width; ++j) {
      Vec square[BANDS];
      for (int n = 0; n < BANDS; ++n) {
        const int64_t row = 2 * i + n / 2, column = 2 * j + n % 2;
        const bool is_inside = row < map.height && column < map.width;
        square[n] = is_inside ? load<IS_PART>(x + row * map.row + column * map.pixel, count) : Vec{};
      }
      haar(square);
      for (int n = 0; n < BANDS; ++n)
        store(to + bands.at(i + bands.reach, j + bands.reach) + n * LANES, square[n]);
    }
}

// COUNT squares side by side: a weight that is loaded serves them all.
template <bool IS_PART, int COUNT>
INLINE void convolve(
    const Wavelet& w, const Bands& bands, const float* from, const float* weights, int64_t image, int64_t channel,
    int64_t count, int64_t i, int64_t j) {
  Vec squares[COUNT][BANDS] = {};
  for (int64_t y = 0; y < w.side; ++y)
    for (int64_t x = 0; x < w.side; ++x) {
      const float* square = from + bands.at(i + y, j + x);
      const float* weight = weights + (y * w.side + x) * BANDS * LANES;
      for (int n = 0; n < BANDS; ++n) {
        const Vec factor = load(weight + n * LANES);
        for (int s = 0; s < COUNT; ++s)
          squares[s][n] += load(square + (s * BANDS + n) * LANES) * factor;
      }
    }
  const float* base = w.base.data + image * w.base.image + channel;
  float* out = w.out.data + image * w.out.image + channel;
  for (int s = 0; s < COUNT; ++s) {
    haar(squares[s]);
    for (int n = 0; n < BANDS; ++n) {
      const int64_t row = 2 * i + n / 2, column = 2 * (j + s) + n % 2;
      if (row < w.out.height && column < w.out.width) {
        const Vec below = load<IS_PART>(base + row * w.base.row + column * w.base.pixel, count);
        store<IS_PART>(out + row * w.out.row + column * w.out.pixel, below + squares[s][n], count);
      }
    }
  }
}

template <bool IS_PART>
static void wavelet_channels(const Wavelet& w, int64_t image, int64_t channel, int64_t count, float* work) {
  const Bands bands(w.x.height, w.x.width, w.side);
  float* weights = work + bands.size();
  for (int64_t i = 0; i < w.side * w.side * BANDS; ++i)
    store(weights + i * LANES, load<IS_PART>(w.weight + i * w.x.channels + channel, count));
  transform<IS_PART>(w.x, bands, image, channel, count, work);
  for (int64_t i = 0; i < bands.height; ++i) {
    int64_t j = 0;
    for (; j + 2 <= bands.width; j += 2)
      convolve<IS_PART, 2>(w, bands, work, weights, image, channel, count, i, j);
    if (j < bands.width)
      convolve<IS_PART, 1>(w, bands, work, weights, image, channel, count, i, j);
  }
}

static void wavelet(const Wavelet& w, int64_t image, int64_t channel, float* work) {
  const int64_t count = w.x.channels - channel;
  if (count >= LANES)
    wavelet_channels<false>(w, image, channel, LANES, work);
  else
    wavelet_channels<true>(w, image, channel, count, work);
}
