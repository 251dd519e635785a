// Batch normalisation and its gradients. Included once for each instruction set, after cpu/channels.h.

constexpr int GROUP = 4;  // rows that share a load and a store of a running sum

// Calls `body(row, count)` for all rows: GROUP at a time, and those left over one by one.
template <class Body>
INLINE void for_each_group(int64_t rows, Body body) {
  int64_t row = 0;
  for (; row + GROUP <= rows; row += GROUP)
    body(row, Constant<GROUP>());
  for (; row < rows; ++row)
    body(row, Constant<1>());
}

// Prefetches rows further on: the processor itself looks ahead no further than the end of a page.
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

// Kernels work on copies of what describes their maps: stores cannot change these, and their numbers are not read again
// after each. Means and factors of channels are read once for a group of rows, activations chosen once for all.

// Calls `body(activation)` with it as a constant.
template <class Body>
INLINE void with_activation(Activation activation, Body body) {
  if (activation == kRelu)
    body(Constant<kRelu>());
  else if (activation == kSilu)
    body(Constant<kSilu>());
  else
    body(Constant<kNone>());
}

// Means of the channels over some rows.
static void means(const Matrix& map, int64_t rows, int64_t channels, float* mean) {
  const Matrix x = map;
  clear(mean, channels);
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
}

// Means of the channels over some rows, and the sums of the squared distances from them.
static void moments(const Matrix& map, int64_t rows, int64_t channels, float* mean, float* squares) {
  const Matrix x = map;
  means(x, rows, channels, mean);
  clear(squares, channels);
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

template <Activation ACTIVATION, bool HAS_RESIDUAL>
static void normalize_rows(Normalization n, Matrix x, Matrix residual, Matrix out, int64_t rows) {
  for_each_group(rows, [&](int64_t row, auto group) {
    for_each_channel(n.channels, [&](int64_t c, auto is_part) {
      const int64_t count = n.channels - c;
      const Vec mean = load<is_part.value>(n.mean + c, count), scale = load<is_part.value>(n.scale + c, count);
      const Vec shift = load<is_part.value>(n.shift + c, count);
#pragma GCC unroll 4
      for (int i = 0; i < group.value; ++i) {
        prefetch(x.at(row + i) + c);
        prefetch_to_write(out.at(row + i) + c);
        const Vec distance = load<is_part.value>(x.at(row + i) + c, count) - mean;
        Vec value = activate(distance * scale + shift, ACTIVATION);
        if (HAS_RESIDUAL) {
          prefetch(residual.at(row + i) + c);
          value += load<is_part.value>(residual.at(row + i) + c, count);
        }
        store<is_part.value>(out.at(row + i) + c, value, count);
      }
    });
  });
}

// out = the normalisation of x, plus residual where that has an address.
static void normalize(
    const Normalization& n, const Matrix& x, const Matrix& residual, const Matrix& out, int64_t rows) {
  with_activation(n.activation, [&](auto activation) {
    if (residual.data)
      normalize_rows<activation.value, true>(n, x, residual, out, rows);
    else
      normalize_rows<activation.value, false>(n, x, residual, out, rows);
  });
}

// The gradient before the activation.
template <Activation ACTIVATION>
INLINE Vec through_activation(Vec grad, Vec distance, Vec scale, Vec shift) {
  if (ACTIVATION == kNone)
    return grad;
  const Vec value = distance * scale + shift;
  if (ACTIVATION == kRelu)
    return (Vec)((value > 0.f) & (IntVec)grad);
  const Vec share = sigmoid(value);
  return grad * share * (1.f + value * (1.f - share));
}

// Calls `body(row, g, distance)` for a vector of channels of COUNT rows: the gradient before the activation, and how
// far x is from its mean.
template <Activation ACTIVATION, int COUNT, bool IS_PART, class Body>
INLINE void for_each_gradient(
    const Normalization& n, const Matrix& grad, const Matrix& x, int64_t first, int64_t c, Body body) {
  const int64_t count = n.channels - c;
  const Vec mean = load<IS_PART>(n.mean + c, count), scale = load<IS_PART>(n.scale + c, count);
  const Vec shift = load<IS_PART>(n.shift + c, count);
#pragma GCC unroll 4
  for (int64_t row = first; row < first + COUNT; ++row) {
    prefetch(x.at(row) + c);
    prefetch(grad.at(row) + c);
    const Vec distance = load<IS_PART>(x.at(row) + c, count) - mean;
    body(row, through_activation<ACTIVATION>(load<IS_PART>(grad.at(row) + c, count), distance, scale, shift), distance);
  }
}

template <Activation ACTIVATION>
static void normalize_sums_of(Normalization n, Matrix grad, Matrix x, int64_t rows, float* sums, float* products) {
  clear(sums, n.channels);
  clear(products, n.channels);
  for_each_group(rows, [&](int64_t first, auto group) {
    for_each_channel(n.channels, [&](int64_t c, auto is_part) {
      const int64_t count = n.channels - c;
      Vec sum = load<is_part.value>(sums + c, count), product = load<is_part.value>(products + c, count);
      for_each_gradient<ACTIVATION, group.value, is_part.value>(
          n, grad, x, first, c, [&](int64_t, Vec g, Vec distance) {
            sum += g;
            product += g * distance;
          });
      store<is_part.value>(sums + c, sum, count);
      store<is_part.value>(products + c, product, count);
    });
  });
}

// Sums over rows of grad, as it is before the activation, and of grad * (x - mean).
static void normalize_sums(
    const Normalization& n, const Matrix& grad, const Matrix& x, int64_t rows, float* sums, float* products) {
  with_activation(
      n.activation, [&](auto activation) { normalize_sums_of<activation.value>(n, grad, x, rows, sums, products); });
}

template <Activation ACTIVATION>
static void normalize_backward_of(
    Normalization n, const float* offset, const float* slope, Matrix grad, Matrix x, Matrix dx, int64_t rows) {
  for_each_group(rows, [&](int64_t first, auto group) {
    for_each_channel(n.channels, [&](int64_t c, auto is_part) {
      const int64_t count = n.channels - c;
      const Vec scale = load<is_part.value>(n.scale + c, count), gain = load<is_part.value>(slope + c, count);
      const Vec added = load<is_part.value>(offset + c, count);
      for_each_gradient<ACTIVATION, group.value, is_part.value>(
          n, grad, x, first, c, [&](int64_t row, Vec g, Vec distance) {
            store<is_part.value>(dx.at(row) + c, scale * g + added + gain * distance, count);
          });
    });
  });
}

// dx = scale * grad + offset + slope * (x - mean), with grad as above; dx may be grad.
static void normalize_backward(
    const Normalization& n, const float* offset, const float* slope, const Matrix& grad, const Matrix& x,
    const Matrix& dx, int64_t rows) {
  with_activation(n.activation, [&](auto activation) {
    normalize_backward_of<activation.value>(n, offset, slope, grad, x, dx, rows);
  });
}
