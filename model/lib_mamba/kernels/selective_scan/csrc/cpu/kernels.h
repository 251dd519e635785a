// What the CPU operators (cpu.cpp) and the kernels for each instruction set (cpu_<set>.cpp) share.
//
// B batch, L length, D channels, K directions, N states, R rank of the time step. Sequences are channels-last.
// Channels are cut into blocks of a few vectors; a block is scanned from end to end with its state at hand.
#pragma once

#include <cstdint>

namespace mobilemamba {

// One call: tensors by address, strides in elements. "Element" is float or bfloat16 (is_bfloat16).
struct Problem {
  int64_t batch, length, channels, directions, states, rank;
  const int64_t* reverse;  // K flags
  bool is_bfloat16;        // the type of x, z, grad (of the gated scan), y (likewise), dx and dz
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

constexpr int64_t kColumns = 16;  // of a vector of any instruction set, or of several

// How many of the vectors that are left are multiplied at once: three, and two where a single one would be left.
inline int64_t panel_size(int64_t left) {
  return left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
}

// The weight of a product, columns padded with zeros to `width`. They lie in panels of up to three times kColumns, one
// behind the other, each with all rows: what is read at once lies side by side.
struct Weight {
  int64_t rows, width;
  const float* data;

  static int64_t panel_columns(int64_t left) { return panel_size(left / kColumns) * kColumns; }
};

// A product of rows of numbers with a matrix, and what follows it: out = act(row . weight + bias) + residual. A row may
// lie in several pieces, as the pixels under a convolution's kernel do.
struct Dense {
  int64_t depth, columns;
  int64_t pieces, piece_stride;   // `depth` numbers each,
  int64_t first_row, piece_rows;  // and their rows of the weight: where they begin, and how far apart they lie
  Weight weight;
  const float* bias;  // (columns)
  Activation activation;
  const float* residual;  // as out, rows residual_row apart; null for none
  int64_t residual_row;
  float* out;
  int64_t out_row;
};

// Maps are channels-last, in floats; pixels, rows of pixels and images lie `pixel`, `row`, `image` floats apart.
struct Map {
  int64_t height, width, channels;
  int64_t image, row, pixel;
  float* data;
};

// out = act(depthwise convolution of x + bias), then times scale, plus shift where there is a scale.
struct Depthwise {
  Map x, out;
  int64_t side, stride, padding;
  const float* weight;  // (side, side, C)
  const float* bias;    // (C)
  Activation activation;
  const float *scale, *shift;  // (C), or null
};

// out = base + inverse Haar transform of the depthwise convolution of the Haar bands of x.
struct Wavelet {
  Map x, base, out;
  int64_t side;
  const float* weight;  // (side, side, 4, C)
};

// A batch normalisation of rows of channels, and what follows: act((x - mean) * scale + shift).
struct Normalization {
  int64_t channels;
  const float *mean, *scale, *shift;  // (C)
  Activation activation;              // none or ReLU
};

// Rows of numbers, `stride` apart.
struct Matrix {
  float* data;
  int64_t stride;

  float* at(int64_t row) const { return data + row * stride; }
  Matrix from(int64_t row) const { return {data ? at(row) : nullptr, stride}; }
};

// Gradient of the weight of a product: sums over all rows of x times those of grad. Rows lie in lines of `count` each, and
// lines `x_line`, `grad_line` floats apart. Those of grad are read in whole vectors: what lies behind its columns goes to
// columns of the same number behind those of the result.
struct DenseGradient {
  Matrix x, grad;
  int64_t count, lines, x_line, grad_line;
  int64_t depth, vectors;
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

// The functions for one instruction set. A scratch image is L * padded(D) floats: block after block, rows within.
struct Kernels {
  const char* name;
  int64_t lanes;
  // Scan a block of an image: every row of the sum of the directions, into the scratch image.
  void (*scan)(const Problem&, int64_t image, int64_t block, float* sums, float* work);
  // Rows [first, last) of the scratch image to the output, normalised and gated if asked for.
  void (*finish)(const Problem&, int64_t image, int64_t first, int64_t last, const float* sums, float* work);
  // Replace such rows by their gradient; write dz; add to the sums (D padded) for the normalisation's parameters.
  void (*finish_backward)(
      const Problem&, int64_t image, int64_t first, int64_t last, float* sums, float* dnorm_weight, float* dnorm_bias,
      float* work);
  // Gradients of a block: dx written, dprojection (L, K * (R + 2N)) and the parameters' sums added to.
  void (*scan_backward)(
      const Problem&, int64_t image, int64_t block, const float* dsums, float* dprojection, const ParameterSums&,
      float* work);
  int64_t (*num_blocks)(int64_t channels);
  int64_t (*work_size)(const Problem&, bool is_backward);  // floats
  // Rows of x, `stride` apart, times columns [first, last), in units of `lanes`; row 0 belongs to row 0 of the output.
  void (*dense)(const Dense&, const float* x, int64_t stride, int64_t rows, int64_t first, int64_t last);
  // A row of pixels of one image, a block of channels.
  void (*depthwise)(const Depthwise&, int64_t image, int64_t row, int64_t block);
  // An image, `lanes` channels from `channel` on.
  void (*wavelet)(const Wavelet&, int64_t image, int64_t channel, float* work);
  int64_t (*wavelet_work_size)(int64_t height, int64_t width, int64_t side);  // floats
  // Means of the channels over some rows, and the sums of the squared distances from them.
  void (*moments)(const Matrix& x, int64_t rows, int64_t channels, float* mean, float* squares);
  // out = the normalisation of x, plus residual where that has an address.
  void (*normalize)(const Normalization&, const Matrix& x, const Matrix& residual, const Matrix& out, int64_t rows);
  // Sums over rows of grad, as it is before the activation, and of grad * (x - mean).
  void (*normalize_sums)(
      const Normalization&, const Matrix& grad, const Matrix& x, int64_t rows, float* sums, float* products);
  // dx = scale * grad + offset + slope * (x - mean), with grad as above; dx may be grad.
  void (*normalize_backward)(
      const Normalization&, const float* offset, const float* slope, const Matrix& grad, const Matrix& x,
      const Matrix& dx, int64_t rows);
  // A row of pixels of dx, a block of channels.
  void (*depthwise_input)(const DepthwiseGradient&, int64_t image, int64_t row, int64_t block);
  // Add what an image gives the weight's gradient (side, side, C), a block of channels.
  void (*depthwise_taps)(const DepthwiseGradient&, int64_t image, int64_t block, float* dweight);
  // Likewise (side, side, 4, C), `lanes` channels from `channel` on.
  void (*wavelet_taps)(const WaveletGradient&, int64_t image, int64_t channel, float* dweight, float* work);
  // Add the product of x's transpose with grad to out (depth, vectors of columns).
  void (*dense_weight)(const DenseGradient&, const Matrix& out);
};

const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
const Kernels& portable_kernels();

}  // namespace mobilemamba
