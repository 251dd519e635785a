// The CPU kernels of one instruction set without PyTorch, against double precision: for processors that are only
// emulated here. Prints the largest relative error of each kernel; fails where one is too large.
#include <cmath>
#include <cstdio>
#include <vector>

#include SET

using namespace mobilemamba;

namespace {

using Floats = std::vector<float>;

bool has_failed = false;

// The same numbers everywhere, in [-1, 1).
float number() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.f - 1.f;
}

Floats numbers(int64_t count) {
  Floats values(count);
  for (float& value : values)
    value = number();
  return values;
}

// Memory that a kernel must fill.
Floats unknown(int64_t count) {
  return Floats(count, NAN);
}

double activated(double value, int64_t activation) {
  if (activation == kRelu)
    return std::fmax(value, 0.);
  return activation == kSilu ? value / (1 + std::exp(-value)) : value;
}

template <class Expected>
void compare(const char* name, const Floats& actual, Expected expected, double tolerance) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double difference = std::fabs(actual[i] - expected(static_cast<int64_t>(i)));
    error = difference > error || std::isnan(difference) ? difference : error;
    largest = std::fmax(largest, std::fabs(expected(static_cast<int64_t>(i))));
  }
  const bool is_fine = error <= tolerance * largest;
  has_failed |= !is_fine;
  std::printf("%s %.1e%s\n", name, error / largest, is_fine ? "" : " FAILED");
}

void check_dense(const Kernels& kernels, int64_t rows, int64_t depth, int64_t columns, Activation activation) {
  const int64_t lanes = kernels.lanes, width = round_up(columns, lanes);
  const Panels panels{width / lanes};
  const Floats x = numbers(rows * depth), matrix = numbers(depth * columns), bias = numbers(columns);
  const Floats residual = numbers(rows * columns);
  Floats packed(depth * width);
  for (int64_t i = 0; i < panels.count(); ++i) {
    const int64_t start = panels[i].start * lanes, size = panels[i].count * lanes;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < size && start + n < columns; ++n)
        packed[start * depth + k * size + n] = matrix[k * columns + start + n];
  }
  Floats out = unknown(rows * columns);
  Dense d;
  d.depth = depth, d.columns = d.out_row = d.residual_row = columns;
  d.weight = {depth, packed.data()};
  d.bias = bias.data(), d.residual = residual.data(), d.out = out.data();
  d.activation = activation;
  kernels.dense(d, x.data(), depth, rows, 0, panels.count());
  compare(
      "dense", out,
      [&](int64_t i) {
        double sum = bias[i % columns];
        for (int64_t k = 0; k < depth; ++k)
          sum += static_cast<double>(x[i / columns * depth + k]) * matrix[k * columns + i % columns];
        return activated(sum, activation) + residual[i];
      },
      2e-6);
}

// Of lines of pixels with something between them, added to what is there.
void check_dense_gradient(const Kernels& kernels, int64_t lines, int64_t count, int64_t depth, int64_t columns) {
  const int64_t x_line = count * depth + 5, grad_line = count * columns + 3;
  Floats x = numbers(lines * x_line), grad = numbers(lines * grad_line), out = numbers(depth * columns);
  const Floats before = out;
  Floats work = unknown(kernels.dense_weight_gradient_work_size(depth, columns));
  const Matrix x_rows{x.data(), depth}, grad_rows{grad.data(), columns};
  const DenseGradient d{x_rows, grad_rows, count, lines, x_line, grad_line, depth, columns};
  kernels.dense_weight_gradient(d, {out.data(), columns}, work.data());
  compare(
      "dense_weight_gradient", out,
      [&](int64_t i) {
        double sum = before[i];
        for (int64_t line = 0; line < lines; ++line)
          for (int64_t k = 0; k < count; ++k)
            sum += static_cast<double>(x[line * x_line + k * depth + i / columns]) *
                   grad[line * grad_line + k * columns + i % columns];
        return sum;
      },
      2e-6);
}

Map map_of(Floats& values, int64_t height, int64_t width, int64_t channels) {
  return {height, width, channels, height * width * channels, width * channels, channels, values.data()};
}

double at(const Map& x, int64_t row, int64_t column, int64_t channel) {
  const bool is_inside = row >= 0 && row < x.height && column >= 0 && column < x.width;
  return is_inside ? x.data[row * x.row + column * x.pixel + channel] : 0.;
}

void check_depthwise(const Kernels& kernels, int64_t side, int64_t stride, int64_t channels, Activation activation) {
  const int64_t height = 7, width = 9, padding = side / 2;
  const int64_t out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
  Floats x = numbers(height * width * channels), out = unknown(out_height * out_width * channels);
  const Floats weight = numbers(side * side * channels), bias = numbers(channels);
  const Map from = map_of(x, height, width, channels), to = map_of(out, out_height, out_width, channels);
  const Depthwise d{from, to, side, stride, padding, weight.data(), bias.data(), activation, nullptr, nullptr};
  for (int64_t row = 0; row < out_height; ++row)
    for (int64_t block = 0; block < kernels.num_blocks(channels); ++block)
      kernels.depthwise(d, 0, row, block);
  compare(
      "depthwise", out,
      [&](int64_t i) {
        const int64_t channel = i % channels, column = i / channels % out_width, row = i / channels / out_width;
        double sum = bias[channel];
        for (int64_t k = 0; k < side * side; ++k)
          sum += weight[k * channels + channel] *
                 at(from, row * stride - padding + k / side, column * stride - padding + k % side, channel);
        return activated(sum, activation);
      },
      2e-6);
}

// The Haar transform and its inverse with a kernel that only passes the bands on, scaled: a sum of two maps.
void check_wavelet(const Kernels& kernels, int64_t height, int64_t width, int64_t channels) {
  constexpr int64_t kSide = 3, kBands = 4;
  Floats x = numbers(height * width * channels), base = numbers(height * width * channels);
  Floats out = unknown(height * width * channels), weight(kSide * kSide * kBands * channels);
  const Floats scale = numbers(channels);
  for (int64_t i = 0; i < kBands * channels; ++i)
    weight[kSide * kSide / 2 * kBands * channels + i] = scale[i % channels];
  const Wavelet w{
      map_of(x, height, width, channels), map_of(base, height, width, channels), map_of(out, height, width, channels),
      kSide, weight.data()};
  Floats work = unknown(kernels.wavelet_work_size(height, width, kSide));
  for (int64_t channel = 0; channel < channels; channel += kernels.lanes)
    kernels.wavelet(w, 0, channel, work.data());
  compare("wavelet", out, [&](int64_t i) { return base[i] + static_cast<double>(scale[i % channels]) * x[i]; }, 2e-6);
}

// Both directions of one image, without gate.
void check_scan(const Kernels& kernels, int64_t length, int64_t channels, int64_t rank) {
  const int64_t directions = 2, share = rank + 2, padded = round_up(channels, kernels.lanes);
  const int64_t reverse[] = {0, 1};
  const Floats x = numbers(length * channels), projection = numbers(length * directions * share);
  const Floats dt_weight = numbers(directions * rank * channels), dt_bias = numbers(directions * channels);
  const Floats A_log = numbers(directions * channels), D_skip = numbers(directions * channels);
  Floats y = unknown(length * channels), sums = unknown(padded * length);
  Problem p{};
  p.batch = 1, p.length = length, p.channels = channels, p.directions = directions, p.states = 1, p.rank = rank;
  p.reverse = reverse;
  p.x = x.data(), p.x_row = channels, p.projection = projection.data(), p.y = y.data();
  p.dt_weight = dt_weight.data(), p.dt_bias = dt_bias.data(), p.A_log = A_log.data(), p.D_skip = D_skip.data();
  Floats work = unknown(kernels.work_size(p, false));
  for (int64_t block = 0; block < kernels.num_blocks(channels); ++block)
    kernels.scan(p, 0, block, sums.data(), work.data());
  kernels.finish(p, 0, 0, length, sums.data(), work.data());
  std::vector<double> expected(length * channels);
  for (int64_t k = 0; k < directions; ++k)
    for (int64_t c = 0; c < channels; ++c) {
      double state = 0;
      for (int64_t i = 0; i < length; ++i) {
        const int64_t t = reverse[k] ? length - 1 - i : i;
        const float* own = projection.data() + (t * directions + k) * share;
        double v = dt_bias[k * channels + c];
        for (int64_t r = 0; r < rank; ++r)
          v += static_cast<double>(dt_weight[(k * rank + r) * channels + c]) * own[r];
        const double delta = std::log1p(std::exp(v)), input = x[t * channels + c];
        state = std::exp(-delta * std::exp(static_cast<double>(A_log[k * channels + c]))) * state +
                delta * own[rank] * input;
        expected[t * channels + c] += own[rank + 1] * state + D_skip[k * channels + c] * input;
      }
    }
  compare("scan", y, [&](int64_t i) { return expected[i]; }, 5e-6);
}

}  // namespace

int main() {
  const Kernels& kernels = KERNELS();
  std::printf("%s\n", kernels.name);
  for (const int64_t rows : {1, 3, 9, 25})
    for (const int64_t columns : {1, 7, 24, 29, 66})
      check_dense(kernels, rows, 37, columns, rows % 2 ? kRelu : kSilu);
  for (const int64_t depth : {1, 7, 26})
    for (const int64_t columns : {1, 23, 50, 220}) {
      check_dense_gradient(kernels, 1, 37, depth, columns);
      check_dense_gradient(kernels, 3, 100, depth, columns);
    }
  for (const int64_t side : {3, 5, 7})
    for (const int64_t channels : {3, 8, 29})
      for (const int64_t stride : {1, 2})
        check_depthwise(kernels, side, stride, channels, side == 3 ? kSilu : kRelu);
  check_wavelet(kernels, 6, 8, 5);
  check_wavelet(kernels, 5, 3, 21);
  check_scan(kernels, 1, 5, 2);
  check_scan(kernels, 35, 29, 7);
  return has_failed;
}
