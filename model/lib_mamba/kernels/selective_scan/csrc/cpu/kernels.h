// The CPU kernels: their arguments, and the list of them.
//
// A kernel is a function in a *_kernels.h, compiled for every instruction set (sets/). The operators call it through
// the table of this processor (cpu/dispatch.h).
#pragma once

#include <cstdint>

namespace mobilemamba {

constexpr int64_t ceil_div(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

constexpr int64_t round_up(int64_t count, int64_t size) {
  return ceil_div(count, size) * size;
}

// A scan: tensors by address, strides in elements. "Element" is float or bfloat16 (is_bfloat16). Sequences are
// channels-last: B batch, L length, D channels, K directions, N states, R rank of the time step.
struct Problem {
  int64_t batch, length, channels, directions, states, rank;
  const int64_t* reverse;  // K flags
  bool is_bfloat16;        // the type of x, z, grad (of the gated scan), y (of the gated scan), dx and dz
  bool is_gated;           // normalise and gate; else y and grad are float and hold the bare sum of the directions
  const void* x;           // (B, L, D), rows x_row apart
  int64_t x_batch, x_row;
  const void* z;
  int64_t z_batch, z_row;
  const float* projection;   // (B, L, K * (R + 2N))
  const float* dt_weight;    // (K, R, D)
  const float* dt_bias;      // (K, D)
  const float* A_log;        // (K, N, D)
  const float* D_skip;       // (K, D)
  const float* norm_weight;  // (D)
  const float* norm_bias;    // (D)
  float eps;
  void* y;  // (B, L, D)

  // For the backward pass.
  const void* grad;
  int64_t grad_batch, grad_row;
  void* dx;  // (B, L, D)
  void* dz;  // (B, L, D)

  int64_t width() const { return directions * (rank + 2 * states); }
};

// Sums over positions and images, each (.., D padded) as the parameter of its name is laid out; added to.
struct ParameterSums {
  float *dt_weight, *dt_bias, *A_log, *D_skip;
};

enum Activation : int64_t { kNone = 0, kRelu = 1, kSilu = 2 };

// Vectors [start, start + count) of columns.
struct Columns {
  int64_t start, count;
};

// Vectors of columns in panels of three, and of two where a single one would be left: as many as a product holds in
// registers at a time.
struct Panels {
  static constexpr int64_t kWidest = 3;
  int64_t vectors;

  int64_t count() const { return ceil_div(vectors, kWidest); }
  Columns operator[](int64_t i) const {
    const int64_t start = i * kWidest, left = vectors - start;
    if (left == 1 && i > 0)
      return {start - 1, 2};
    return {start, left == 4 || left == 2 ? 2 : left == 1 ? 1 : kWidest};
  }
};

// The weight of a product, columns padded with zeros to whole vectors of this processor. They lie in panels, one behind
// the other and each with all rows: numbers that are read together lie next to each other.
struct Weight {
  int64_t rows;
  const float* data;
};

// A product of rows of numbers with a matrix: out = act(row . weight + bias) + residual. A row may
// lie in several pieces, as the pixels under a convolution's kernel do.
struct Dense {
  int64_t depth = 0, columns = 0;
  int64_t pieces = 1, piece_stride = 0;   // `depth` numbers each,
  int64_t first_row = 0, piece_rows = 0;  // and their rows of the weight: where they begin, and how far apart they lie
  Weight weight{};
  const float* bias = nullptr;  // (columns)
  Activation activation = kNone;
  const float* residual = nullptr;  // as out, rows residual_row apart; null for none
  int64_t residual_row = 0;
  float* out = nullptr;
  int64_t out_row = 0;
};

// Maps are channels-last, in floats; pixels, rows of pixels and images lie `pixel`, `row`, `image` floats apart.
struct Map {
  int64_t height, width, channels;
  int64_t image, row, pixel;
  float* data;
};

// out = act(depthwise convolution of x + bias), then times scale, plus shift where there is a scale, and a last act.
struct Depthwise {
  Map x, out;
  int64_t side, stride, padding;
  const float* weight;  // (side, side, C)
  const float* bias;    // (C)
  Activation activation;
  const float *scale, *shift;  // (C), or null
  Activation last_activation = kNone;
};

// out = act(base + inverse Haar transform of the depthwise convolution of the Haar bands of x).
struct Wavelet {
  Map x, base, out;
  int64_t side;
  const float* weight;  // (side, side, 4, C)
  Activation activation = kNone;
};

// A batch normalisation of rows of channels, and its activation: act((x - mean) * scale + shift).
struct Normalization {
  int64_t channels;
  const float *mean, *scale, *shift;  // (C)
  Activation activation;
};

// Rows of numbers, `stride` apart.
struct Matrix {
  float* data;
  int64_t stride;

  float* at(int64_t row) const { return data + row * stride; }
  Matrix from(int64_t row) const { return {data ? at(row) : nullptr, stride}; }
};

// Gradient of the weight of a product: sums over all rows of x times those of grad. Rows lie in lines of `count` each,
// and lines `x_line`, `grad_line` floats apart.
struct DenseGradient {
  Matrix x, grad;
  int64_t count, lines, x_line, grad_line;
  int64_t depth, columns;
};

// Gradients of a depthwise convolution; dx is added to base, where that has an address.
struct DepthwiseGradient {
  Map grad, x, dx, base;
  int64_t side, stride, padding;
  const float* weight;  // (side, side, C)
};

// Gradient of the wavelet branch's weight.
struct WaveletGradient {
  Map grad, x;
  int64_t side;
};

// The kernels: result, name, parameters. Each is documented where it is defined.
#define FOR_EACH_KERNEL(KERNEL)                                                                                        \
  /* scan/cpu_kernels.h, scan/cpu_backward_kernels.h */                                                                \
  KERNEL(void, scan, const Problem&, int64_t image, int64_t block, float* sums, float* work)                           \
  KERNEL(void, finish, const Problem&, int64_t image, int64_t first, int64_t last, const float* sums, float* work)     \
  KERNEL(                                                                                                              \
      void, finish_backward, const Problem&, int64_t image, int64_t first, int64_t last, float* sums,                  \
      float* dnorm_weight, float* dnorm_bias, float* work)                                                             \
  KERNEL(                                                                                                              \
      void, scan_backward, const Problem&, int64_t image, int64_t block, const float* dsums, float* dprojection,       \
      const ParameterSums&, float* work)                                                                               \
  KERNEL(int64_t, work_size, const Problem&, bool is_backward)                                                         \
  /* cpu/channels.h */                                                                                                 \
  KERNEL(int64_t, num_blocks, int64_t channels)                                                                        \
  /* layers/product_kernels.h */                                                                                       \
  KERNEL(void, dense, const Dense&, const float* x, int64_t stride, int64_t rows, int64_t first, int64_t last)         \
  KERNEL(void, dense_weight_gradient, const DenseGradient&, const Matrix& out, float* work)                            \
  KERNEL(int64_t, dense_weight_gradient_work_size, int64_t depth, int64_t columns)                                     \
  KERNEL(void, pack_panel, const Matrix& from, int64_t rows, int64_t columns, int64_t width, float* to)                \
  KERNEL(void, pack_transposed_panel, const Matrix& from, int64_t rows, int64_t columns, int64_t width, float* to)     \
  /* layers/depthwise_kernels.h */                                                                                     \
  KERNEL(void, depthwise, const Depthwise&, int64_t image, int64_t row, int64_t block)                                 \
  KERNEL(void, depthwise_input_gradient, const DepthwiseGradient&, int64_t image, int64_t row, int64_t block)          \
  KERNEL(void, depthwise_weight_gradient, const DepthwiseGradient&, int64_t image, int64_t block, float* dweight)      \
  /* layers/wavelet_kernels.h */                                                                                       \
  KERNEL(void, wavelet, const Wavelet&, int64_t image, int64_t channel, float* work)                                   \
  KERNEL(                                                                                                              \
      void, wavelet_weight_gradient, const WaveletGradient&, int64_t image, int64_t channel, float* dweight,           \
      float* work)                                                                                                     \
  KERNEL(int64_t, wavelet_work_size, int64_t height, int64_t width, int64_t side)                                      \
  /* layers/norm_kernels.h */                                                                                          \
  KERNEL(void, means, const Matrix& x, int64_t rows, int64_t channels, float* mean)                                    \
  KERNEL(void, moments, const Matrix& x, int64_t rows, int64_t channels, float* mean, float* squares)                  \
  KERNEL(                                                                                                              \
      void, normalize, const Normalization&, const Matrix& x, const Matrix& residual, const Matrix& out, int64_t rows) \
  KERNEL(                                                                                                              \
      void, normalize_sums, const Normalization&, const Matrix& grad, const Matrix& x, int64_t rows, float* sums,      \
      float* products)                                                                                                 \
  KERNEL(                                                                                                              \
      void, normalize_backward, const Normalization&, const float* offset, const float* slope, const Matrix& grad,     \
      const Matrix& x, const Matrix& dx, int64_t rows)

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int64_t lanes;
#define KERNEL(result, name, ...) result (*name)(__VA_ARGS__);
  FOR_EACH_KERNEL(KERNEL)
#undef KERNEL
};

const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
const Kernels& portable_kernels();

}  // namespace mobilemamba
