// The scan's kernels going backward. Included once for each instruction set, after scan/cpu_kernels.h.

template <class T>
static void finish_gated_backward(
    const Problem& p, int64_t image, int64_t first, int64_t last, float* sums, float* dnorm_weight, float* dnorm_bias,
    float* work) {
  const int64_t D = p.channels;
  Rows rows(p, work);
  float* inner = work;
  for (int64_t start = first; start < last; start += Rows::MOST) {
    const int count = last - start < Rows::MOST ? last - start : Rows::MOST;
    rows.read(p, sums, start, count);
    for (int i = 0; i < count; ++i) {
      const int64_t t = start + i;
      float *normed = rows.values + i * rows.stride, mean = rows.mean[i], rstd = rows.rstd[i];
      const T* z = static_cast<const T*>(p.z) + image * p.z_batch + t * p.z_row;
      const T* grad = static_cast<const T*>(p.grad) + image * p.grad_batch + t * p.grad_row;
      T* dz = static_cast<T*>(p.dz) + (image * p.length + t) * D;
      Vec total{}, projected{};  // of the normalised row's gradient; it is zero where there are no channels
      for_each_channel(D, [&](int64_t c, auto is_part) {
        constexpr bool part = decltype(is_part)::value;
        const Vec gate = load<part>(z + c, D - c), g = load<part>(grad + c, D - c);
        const Vec weight = load<part>(p.norm_weight + c, D - c), bias = load<part>(p.norm_bias + c, D - c);
        const Vec value = (load(normed + c) - mean) * rstd;
        const Vec open = sigmoid(gate), silu = gate * open;
        store<part>(dz + c, g * (value * weight + bias) * (open + silu * (1.f - open)), D - c);
        const Vec dnormed = g * silu, dvalue = dnormed * weight;
        store(dnorm_weight + c, load(dnorm_weight + c) + dnormed * value);
        store(dnorm_bias + c, load(dnorm_bias + c) + dnormed);
        store(normed + c, value);
        store(inner + c, dvalue);
        total += dvalue;
        projected += dvalue * value;
      });
      const float shift = sum(total) / D, slope = sum(projected) / D;
      for_each_vector(p, sums, [&](int64_t c, float* out, int64_t step) {
        Vec dy = (load(inner + c) - shift - load(normed + c) * slope) * rstd;
        if (c + LANES > D)
          dy = first_lanes(dy, D - c);
        store(out + t * step, dy);
      });
    }
  }
}

static void finish_plain_backward(const Problem& p, int64_t image, int64_t first, int64_t last, float* sums) {
  const int64_t D = p.channels;
  const float* grad = static_cast<const float*>(p.grad) + image * p.grad_batch;
  for_each_vector(p, sums, [&](int64_t c, float* rows, int64_t stride) {
    for (int64_t t = first; t < last; ++t) {
      const float* from = grad + t * p.grad_row + c;
      store(rows + t * stride, c + LANES <= D ? load(from) : load_part(from, D - c));
    }
  });
}

// Everything the backward pass of a block keeps between its steps.
template <int NV>
struct Backward {
  static constexpr int64_t W = NV * LANES;
  const Problem& p;
  Parameters<NV> parameters;
  float *dweight, *dbias, *drate, *carry, *skips, *dskip;
  float *steps, *states, *dx;  // (L, .), (N, L + 1, .), (L, .)
  // Of the current tile: gradients of delta, later of softplus's argument; the same with positions innermost.
  alignas(64) float ddelta[TILE * W], inputs[TILE * W], across[W * TILE];

  Backward(const Problem& p, float* work) : p(p), parameters(work, p) {
    const auto take = [&](int64_t rows) {
      float* start = work;
      work += rows * W;
      return start;
    };
    dweight = take(p.rank);
    dbias = take(1);
    drate = take(p.states);
    carry = take(p.states);
    skips = take(1);
    dskip = take(1);
    steps = take(p.length + 1);
    states = take(p.states * (p.length + 1));
    dx = take(p.length);
  }

  // Row t of component n's states, where t - 1 (or t + 1, if reversed) is the one before; the first before is zero.
  float* state(int64_t n, int64_t t, bool is_reverse) { return states + (n * (p.length + 1) + t + !is_reverse) * W; }

  // All time steps and states of a direction.
  template <class T, bool IS_PART>
  void recompute(const T* x, int64_t count, const float* own, bool is_reverse) {
    const int64_t L = p.length, width = p.width();
    for (int64_t t = 0; t < L; t += TILE)
      time_steps<NV>(steps + t * W, parameters, own + t * width, width, L - t < TILE ? L - t : TILE, p.rank);
    for (int64_t n = 0; n < p.states; ++n) {
      Vec value[NV], rate[NV];
      for (int v = 0; v < NV; ++v) {
        value[v] = Vec{};
        rate[v] = load(parameters.rate + n * W + v * LANES);
        store(state(n, is_reverse ? L : -1, is_reverse) + v * LANES, value[v]);
      }
      for (int64_t i = 0; i < L; ++i) {
        const int64_t t = is_reverse ? L - 1 - i : i;
        const float b = own[t * width + p.rank + n] * LN2;
        float* out = state(n, t, is_reverse);
        for (int v = 0; v < NV; ++v) {
          const Vec step = load(steps + t * W + v * LANES);
          const Vec input = load<IS_PART>(x + t * p.x_row + v * LANES, count);
          value[v] = decay(rate[v] * step, value[v], step * input * b);
          store(out + v * LANES, value[v]);
        }
      }
    }
  }

  // The state's gradient through a tile, against the order of travel: gradients of delta, x, A, B and C.
  template <class T, bool IS_PART, bool IS_FIRST>
  void retreat(
      const T* x, int64_t count, const float* dsums, const float* own, float* down, int64_t start, int num_rows,
      int64_t n, bool is_reverse) {
    const int64_t width = p.width();
    Vec back[NV], rate[NV], change[NV];
    for (int v = 0; v < NV; ++v) {
      back[v] = load(carry + n * W + v * LANES);
      rate[v] = load(parameters.rate + n * W + v * LANES);
      change[v] = load(drate + n * W + v * LANES);
    }
    for (int i = 0; i < num_rows; ++i) {
      const int64_t row = is_reverse ? i : num_rows - 1 - i, t = start + row;
      const int64_t B = t * width + p.rank + n, C = B + p.states;
      const float b = own[B], c = own[C];
      const float *now = state(n, t, is_reverse), *before = now + (is_reverse ? W : -W);
      Vec sum_B{}, sum_C{};
      for (int v = 0; v < NV; ++v) {
        const Vec input = load<IS_PART>(x + t * p.x_row + v * LANES, count);
        const Vec grad = load(dsums + t * W + v * LANES);
        const Vec step = load(steps + t * W + v * LANES), delta = step * LN2;
        const Vec dstate = grad * c + back[v];
        sum_C += grad * load(now + v * LANES);
        sum_B += dstate * delta * input;
        back[v] = decay(rate[v] * step, dstate, Vec{});
        const Vec dlog_decay = back[v] * load(before + v * LANES);
        change[v] += dlog_decay * delta;
        const Vec change_delta = dlog_decay * rate[v] + dstate * b * input;
        const Vec change_input = dstate * b * delta;
        const int64_t at = (row * NV + v) * LANES;
        store(ddelta + at, IS_FIRST ? change_delta : load(ddelta + at) + change_delta);
        store(inputs + at, IS_FIRST ? change_input : load(inputs + at) + change_input);
      }
      down[B] += sum(sum_B);
      down[C] += sum(sum_C);
    }
    for (int v = 0; v < NV; ++v) {
      store(carry + n * W + v * LANES, back[v]);
      store(drate + n * W + v * LANES, change[v]);
    }
  }

  // ddelta becomes the gradient of softplus's argument; rows past the end are zero.
  void through_softplus(int64_t start, int num_rows) {
    for (int v = 0; v < NV; ++v) {
      Vec total = load(dbias + v * LANES);
      for (int row = 0; row < num_rows; ++row) {
        float* at = ddelta + row * W + v * LANES;
        const Vec value = load(at) * one_minus_exp2(load(steps + (start + row) * W + v * LANES));
        store(at, value);
        total += value;
      }
      for (int row = num_rows; row < TILE; ++row)
        store(ddelta + row * W + v * LANES, Vec{});
      store(dbias + v * LANES, total);
    }
  }

  // The gradients of dt (summed over the channels of the block) and of its weight (over the positions of the tile).
  void through_product(const float* dt, float* down, int num_rows) {
    constexpr int columns = TILE / LANES;
    constexpr int together = LANES >= 8 ? 4 : 2;
    const int64_t width = p.width();
    for (int v = 0; v < NV; ++v)
      transpose(ddelta + v * LANES, W, across + v * LANES * TILE, TILE, TILE);
    for (int64_t r = 0; r < p.rank; r += together) {
      const int64_t left = p.rank - r < together ? p.rank - r : together;
      const float* rows[together];
      for (int i = 0; i < together; ++i)
        rows[i] = parameters.weight + (r + (i < left ? i : 0)) * W;
      Vec totals[together][columns] = {};
      for (int64_t c = 0; c < W; ++c)
        for (int j = 0; j < columns; ++j) {
          const Vec value = load(across + c * TILE + j * LANES);
          for (int i = 0; i < together; ++i)
            totals[i][j] += value * rows[i][c];
        }
      for (int64_t i = 0; i < left; ++i) {
        float lanes[TILE];
        for (int j = 0; j < columns; ++j)
          store(lanes + j * LANES, totals[i][j]);
        for (int row = 0; row < num_rows; ++row)
          down[row * width + r + i] += lanes[row];
      }
    }
    for (int64_t r = 0; r < p.rank; ++r) {
      Vec totals[NV];
      for (int v = 0; v < NV; ++v)
        totals[v] = load(dweight + r * W + v * LANES);
      for (int row = 0; row < num_rows; ++row)
        for (int v = 0; v < NV; ++v)
          totals[v] += load(ddelta + row * W + v * LANES) * dt[row * width + r];
      for (int v = 0; v < NV; ++v)
        store(dweight + r * W + v * LANES, totals[v]);
    }
  }

  // Adds a tile's gradient of x to the other directions'; the last direction writes it out.
  template <class T, bool IS_PART>
  void collect(const T* x, T* out, int64_t count, const float* dsums, int64_t start, int num_rows, int64_t k) {
    for (int v = 0; v < NV; ++v) {
      const Vec skip = load(skips + v * LANES);
      Vec total = load(dskip + v * LANES);
      for (int row = 0; row < num_rows; ++row) {
        const int64_t t = start + row;
        Vec value = load(inputs + row * W + v * LANES);
        if (k == 0) {
          const Vec grad = load(dsums + t * W + v * LANES);
          value += grad * skip;
          total += grad * load<IS_PART>(x + t * p.x_row + v * LANES, count);
        } else {
          value += load(dx + t * W + v * LANES);
        }
        if (k == p.directions - 1)
          store<IS_PART>(out + t * p.channels + v * LANES, value, count);
        else
          store(dx + t * W + v * LANES, value);
      }
      store(dskip + v * LANES, total);
    }
  }

  void clear(float* from, int64_t rows) {
    for (int64_t i = 0; i < rows * NV; ++i)
      store(from + i * LANES, Vec{});
  }

  // Adds rows of the block to a sum whose rows are `stride` apart.
  void add(float* to, int64_t stride, const float* from, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
      for (int v = 0; v < NV; ++v) {
        float* at = to + i * stride + v * LANES;
        store(at, load(at) + load(from + i * W + v * LANES));
      }
  }
};

template <class T, int NV, bool IS_PART>
static void scan_block_backward(
    const Problem& p, int64_t image, const Block& block, const float* dsums, float* dprojection,
    const ParameterSums& totals, float* work) {
  const int64_t L = p.length, width = p.width(), share = p.rank + 2 * p.states, P = padded(p.channels);
  const T* x = static_cast<const T*>(p.x) + image * p.x_batch + block.start;
  T* out = static_cast<T*>(p.dx) + image * L * p.channels + block.start;
  Backward<NV> own(p, work);
  add_up_skips<NV, IS_PART>(p, block, own.skips);
  own.clear(own.dskip, 1);
  for (int64_t k = 0; k < p.directions; ++k) {
    const bool is_reverse = p.reverse[k];
    const float* rows = p.projection + image * L * width + k * share;
    float* down = dprojection + k * share;
    own.parameters.template read<IS_PART>(p, k, block);
    own.clear(own.dweight, p.rank + 1 + 2 * p.states);  // and dbias, drate, carry behind it
    own.template recompute<T, IS_PART>(x, block.count, rows, is_reverse);
    const int64_t num_tiles = (L + TILE - 1) / TILE;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t t = (is_reverse ? i : num_tiles - 1 - i) * TILE;
      const int num_rows = L - t < TILE ? L - t : TILE;
      own.template retreat<T, IS_PART, true>(x, block.count, dsums, rows, down, t, num_rows, 0, is_reverse);
      for (int64_t n = 1; n < p.states; ++n)
        own.template retreat<T, IS_PART, false>(x, block.count, dsums, rows, down, t, num_rows, n, is_reverse);
      own.through_softplus(t, num_rows);
      own.through_product(rows + t * width, down + t * width, num_rows);
      own.template collect<T, IS_PART>(x, out, block.count, dsums, t, num_rows, k);
    }
    for (int64_t j = 0; j < p.states * NV; ++j)  // d/dA_log = A * d/dA
      store(own.drate + j * LANES, load(own.drate + j * LANES) * load(own.parameters.rate + j * LANES));
    own.add(totals.dt_weight + k * p.rank * P + block.start, P, own.dweight, p.rank);
    own.add(totals.dt_bias + k * P + block.start, P, own.dbias, 1);
    own.add(totals.A_log + k * p.states * P + block.start, P, own.drate, p.states);
  }
  own.add(totals.D_skip + block.start, P, own.dskip, 1);
}

// Gradients of a block: dx written, dprojection (L, K * (R + 2N)) and the parameters' sums added to.
static void scan_backward(
    const Problem& p, int64_t image, int64_t index, const float* dsums, float* dprojection, const ParameterSums& totals,
    float* work) {
  const Block block = block_at(p.channels, index);
  dsums += block.start * p.length;
  with_types(p, block, [&](auto element, auto num_vectors, auto is_part) {
    scan_block_backward<decltype(element), num_vectors.value, is_part.value>(
        p, image, block, dsums, dprojection, totals, work);
  });
}

// Replaces rows [first, last) of the scratch image by their gradient; writes dz; adds to the sums (D padded) for the
// normalisation's parameters.
static void finish_backward(
    const Problem& p, int64_t image, int64_t first, int64_t last, float* sums, float* dnorm_weight, float* dnorm_bias,
    float* work) {
  if (!p.is_gated)
    finish_plain_backward(p, image, first, last, sums);
  else if (p.is_bfloat16)
    finish_gated_backward<BFloat16>(p, image, first, last, sums, dnorm_weight, dnorm_bias, work);
  else
    finish_gated_backward<float>(p, image, first, last, sums, dnorm_weight, dnorm_bias, work);
}
