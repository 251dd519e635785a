// The wavelet branch and the gradient of its weight. Included once for each instruction set, after cpu/channels.h.

constexpr int BANDS = 4;

// The four Haar bands, in the order of the checkpoints' filters, of a square of pixels 0 1 / 2 3. The same sums take
// the bands back to pixels.
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

  int64_t size() const { return (height + 2 * reach) * columns * BANDS * LANES; }

  int64_t at(int64_t row, int64_t column) const { return (row * columns + column) * BANDS * LANES; }
};

// Floats of work memory: bands and weights; or for the gradient of the weights, bands twice.
static int64_t wavelet_work_size(int64_t height, int64_t width, int64_t side) {
  const int64_t size = Bands(height, width, side).size(), weights = side * side * BANDS * LANES;
  return rounded(size + (size > weights ? size : weights));
}

template <bool IS_PART>
INLINE void transform(const Map& map, const Bands& bands, int64_t image, int64_t channel, int64_t count, float* to) {
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
        const Vec value = activate(below + squares[s][n], w.activation);
        store<IS_PART>(out + row * w.out.row + column * w.out.pixel, value, count);
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

// An image, LANES channels from `channel` on.
static void wavelet(const Wavelet& w, int64_t image, int64_t channel, float* work) {
  const int64_t count = w.x.channels - channel;
  if (count >= LANES)
    wavelet_channels<false>(w, image, channel, LANES, work);
  else
    wavelet_channels<true>(w, image, channel, count, work);
}

// The bands of the gradient times those of x around them, in the cache like those of `wavelet`.
template <int COLUMNS, bool IS_PART>
INLINE void add_band_places(
    const Bands& bands, const float* grad, const float* x, int64_t i, int64_t j, int64_t stride, int64_t count,
    float* to) {
  for (int n = 0; n < BANDS; ++n, to += stride) {
    Vec sums[COLUMNS];
    for (int t = 0; t < COLUMNS; ++t)
      sums[t] = load<IS_PART>(to + t * BANDS * stride, count);
    for (int64_t row = 0; row < bands.height; ++row)
      for (int64_t column = 0; column < bands.width; ++column) {
        const Vec g = load(grad + bands.at(row + bands.reach, column + bands.reach) + n * LANES);
        const float* from = x + bands.at(row + i, column + j) + n * LANES;
        for (int t = 0; t < COLUMNS; ++t)
          sums[t] += g * load(from + t * BANDS * LANES);
      }
    for (int t = 0; t < COLUMNS; ++t)
      store<IS_PART>(to + t * BANDS * stride, sums[t], count);
  }
}

template <bool IS_PART>
static void wavelet_weight_gradient_channels(
    const WaveletGradient& w, int64_t image, int64_t channel, int64_t count, float* dweight, float* work) {
  const Bands bands(w.x.height, w.x.width, w.side);
  float *x = work, *grad = work + bands.size();
  transform<IS_PART>(w.x, bands, image, channel, count, x);
  transform<IS_PART>(w.grad, bands, image, channel, count, grad);
  const int64_t C = w.x.channels;
  for (int64_t i = 0; i < w.side; ++i) {
    float* to = dweight + i * w.side * BANDS * C + channel;
    if (w.side == 3)
      add_band_places<3, IS_PART>(bands, grad, x, i, 0, C, count, to);
    else if (w.side == 5)
      add_band_places<5, IS_PART>(bands, grad, x, i, 0, C, count, to);
    else if (w.side == 7)
      add_band_places<7, IS_PART>(bands, grad, x, i, 0, C, count, to);
    else
      for (int64_t j = 0; j < w.side; ++j)
        add_band_places<1, IS_PART>(bands, grad, x, i, j, C, count, to + j * BANDS * C);
  }
}

// Adds an image's part of the gradient of the weight, (side, side, 4, C), LANES channels from `channel` on.
static void wavelet_weight_gradient(
    const WaveletGradient& w, int64_t image, int64_t channel, float* dweight, float* work) {
  const int64_t count = w.x.channels - channel;
  if (count >= LANES)
    wavelet_weight_gradient_channels<false>(w, image, channel, LANES, dweight, work);
  else
    wavelet_weight_gradient_channels<true>(w, image, channel, count, dweight, work);
}
