// Depthwise convolutions and their gradients. Included once for each instruction set, after cpu/channels.h.

constexpr int PIXELS = LANES == 16 ? 4 : 2;  // side by side, as registers allow: a loaded weight serves them all

// Activates the sums of all pixels: the kind is asked for once, not for every sum.
template <int NV, int COUNT>
INLINE void activate_all(Vec (&sums)[COUNT][NV], Activation activation) {
  if (activation == kRelu)
    for_each_sum<COUNT, NV>([&](int v, int p) { sums[p][v] = activate(sums[p][v], kRelu); });
  else if (activation == kSilu)
    for_each_sum<COUNT, NV>([&](int v, int p) { sums[p][v] = activate(sums[p][v], kSilu); });
}

// Activation, scale and shift, and the last activation of COUNT pixels from (row, column) on.
template <int NV, int COUNT, bool IS_PART>
INLINE void finish_pixels(
    const Depthwise& d, Vec (&sums)[COUNT][NV], int64_t image, int64_t row, int64_t column, int64_t start,
    int64_t count) {
  activate_all(sums, d.activation);
  if (d.scale)
    for_each_sum<COUNT, NV>([&](int v, int p) {
      const int64_t channel = start + v * LANES;
      sums[p][v] = sums[p][v] * load<IS_PART>(d.scale + channel, count) + load<IS_PART>(d.shift + channel, count);
    });
  activate_all(sums, d.last_activation);
  float* out = d.out.data + image * d.out.image + row * d.out.row + column * d.out.pixel + start;
#pragma GCC unroll 4
  for (int p = 0; p < COUNT; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store<IS_PART>(out + p * d.out.pixel + v * LANES, sums[p][v], count);
}

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
  finish_pixels<NV, COUNT, IS_PART>(d, sums, image, row, column, start, count);
}

template <int NV, bool IS_PART>
static void depthwise_row(const Depthwise& given, int64_t image, int64_t row, Block block) {
  const Depthwise d = given;  // stores cannot change this copy: its numbers are not read again after each
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

// A row of pixels of one image, a block of channels.
static void depthwise(const Depthwise& d, int64_t image, int64_t row, int64_t index) {
  const Block block = block_at(d.x.channels, index);
  with_block(block, [&](auto num_vectors, auto is_part) {
    depthwise_row<num_vectors.value, is_part.value>(d, image, row, block);
  });
}

// The places of a kernel in which a row or column of pixels was seen: `first + n * stride` by the output's pixel
// `pixel - n`, for n in [begin, end).
struct Places {
  int64_t first, pixel, begin, end;

  Places(int64_t position, int64_t padding, int64_t stride, int64_t side, int64_t outputs)
      : first((position + padding) % stride),
        pixel((position + padding) / stride),
        begin(pixel < outputs ? 0 : pixel - outputs + 1) {
    const int64_t count = (side - first + stride - 1) / stride;
    end = count < pixel + 1 ? count : pixel + 1;
  }
};

// COUNT pixels of dx side by side, seen in the same places of the kernel: with a stride, one.
template <int NV, int COUNT, bool IS_PART>
INLINE void depthwise_input_gradient_pixels(
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
    const float* grad =
        d.grad.data + image * d.grad.image + (rows.pixel - n) * d.grad.row + columns.pixel * d.grad.pixel + start;
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
static void depthwise_input_gradient_row(const DepthwiseGradient& given, int64_t image, int64_t row, Block block) {
  const DepthwiseGradient d = given;  // as above
  const int64_t stride = STRIDE ? STRIDE : d.stride;
  const Places rows(row, d.padding, stride, d.side, d.grad.height);
  for (int64_t column = 0; column < d.dx.width;) {
    const Places columns(column, d.padding, stride, d.side, d.grad.width);
    const bool is_inside = column + d.padding + 1 >= d.side && column + PIXELS + d.padding <= d.grad.width;
    if (STRIDE == 1 && is_inside) {
      depthwise_input_gradient_pixels<NV, PIXELS, IS_PART>(
          d, image, row, column, stride, rows, columns, block.start, block.count);
      column += PIXELS;
    } else {
      depthwise_input_gradient_pixels<NV, 1, IS_PART>(
          d, image, row, column, stride, rows, columns, block.start, block.count);
      column += 1;
    }
  }
}

// A row of pixels of dx, a block of channels.
static void depthwise_input_gradient(const DepthwiseGradient& d, int64_t image, int64_t row, int64_t index) {
  const Block block = block_at(d.x.channels, index);
  with_block(block, [&](auto num_vectors, auto is_part) {
    if (d.stride == 1)
      depthwise_input_gradient_row<1, num_vectors.value, is_part.value>(d, image, row, block);
    else
      depthwise_input_gradient_row<0, num_vectors.value, is_part.value>(d, image, row, block);
  });
}

// ROWS by COLUMNS places of the kernel, from (i, j) on, for a row of the gradient whose pixels are seen there.
template <int ROWS, int COLUMNS, bool IS_PART, bool IS_BORDER>
INLINE void add_pixel(
    Vec (&sums)[ROWS][COLUMNS], Vec g, const float* x, const Map& map, int64_t top, int64_t left, int64_t count) {
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < COLUMNS; ++t) {
      const bool is_inside = top + i >= 0 && top + i < map.height && left + t >= 0 && left + t < map.width;
      if (!IS_BORDER || is_inside)
        sums[i][t] += g * load<IS_PART>(x + (top + i) * map.row + (left + t) * map.pixel, count);
    }
}

template <int ROWS, int COLUMNS, bool IS_PART>
static void add_places(
    const DepthwiseGradient& d, int64_t image, int64_t i, int64_t j, int64_t channel, int64_t count, float* dweight) {
  const int64_t C = d.x.channels;
  float* to = dweight + (i * d.side + j) * C + channel;
  const float* x = d.x.data + image * d.x.image + channel;
  Vec sums[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < COLUMNS; ++t)
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
      if (is_border || left < 0 || left + COLUMNS > d.x.width)
        add_pixel<ROWS, COLUMNS, IS_PART, true>(sums, g, x, d.x, top, left, count);
      else
        add_pixel<ROWS, COLUMNS, IS_PART, false>(sums, g, x, d.x, top, left, count);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < COLUMNS; ++t)
      store<IS_PART>(to + (r * d.side + t) * C, sums[r][t], count);
}

template <bool IS_PART>
static void add_all_places(const DepthwiseGradient& d, int64_t image, int64_t channel, int64_t count, float* dweight) {
  if (d.side == 3) {
    add_places<3, 3, IS_PART>(d, image, 0, 0, channel, count, dweight);
    return;
  }
  for (int64_t i = 0; i < d.side; ++i)
    if (d.side == 5)
      add_places<1, 5, IS_PART>(d, image, i, 0, channel, count, dweight);
    else if (d.side == 7)
      add_places<1, 7, IS_PART>(d, image, i, 0, channel, count, dweight);
    else
      for (int64_t j = 0; j < d.side; ++j)
        add_places<1, 1, IS_PART>(d, image, i, j, channel, count, dweight);
}

// Adds an image's part of the gradient of the weight, (side, side, C), a block of channels.
static void depthwise_weight_gradient(const DepthwiseGradient& d, int64_t image, int64_t index, float* dweight) {
  const Block block = block_at(d.x.channels, index);
  if (block.is_part) {
    add_all_places<true>(d, image, block.start, block.count, dweight);
    return;
  }
  for (int v = 0; v < block.num_vectors; ++v)
    add_all_places<false>(d, image, block.start + v * LANES, LANES, dweight);
}
