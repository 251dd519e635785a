// What the operators of training share: batch norms, and sums over images.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu_dispatch.h"
#include "cpu_maps.h"

namespace mobilemamba {

struct Statistics {
  const at::Tensor &mean, &var, &weight, &bias;
  double eps;

  void check(int64_t channels) const {
    check_vector(mean, channels, "mean");
    check_vector(var, channels, "var");
    check_vector(weight, channels, "weight");
    check_vector(bias, channels, "bias");
  }

  float rstd(int64_t c) const {
    return static_cast<float>(1 / std::sqrt(var.const_data_ptr<float>()[c] + eps));
  }

  // Fills `scale`, which has as many floats as there are channels.
  Normalization normalization(float* scale, Activation activation) const {
    TORCH_CHECK(activation != kSilu, "a normalisation is followed by nothing (0) or a ReLU (1)");
    const float* factors = weight.const_data_ptr<float>();
    for (int64_t c = 0; c < mean.numel(); ++c)
      scale[c] = factors[c] * rstd(c);
    return {mean.numel(), mean.const_data_ptr<float>(), scale, bias.const_data_ptr<float>(), activation};
  }
};

// Rows, cut into pieces as even as can be.
struct Pieces {
  int64_t rows, count;

  int64_t begin(int64_t i) const { return i * rows / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Pieces that stay in the cache from one pass to the next, as many as most numbers of threads divide.
inline Pieces pieces_of(int64_t rows, int64_t channels) {
  constexpr int64_t most = 1 << 15, round = 16;
  return {rows, std::max<int64_t>(1, std::min(rows, (rows * channels / most / round + 1) * round))};
}

// Calls `body(piece)` on all threads. A thread goes backwards over what was just written or read forwards, and the other
// way round: then the end of it is still in the cache.
enum Order { kForwards, kBackwards };

template <class Body>
void for_pieces(const Pieces& pieces, Order order, Body body) {
  at::parallel_for(0, pieces.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      body(order == kForwards ? k : begin + end - 1 - k);
  });
}

inline Matrix matrix_of(const at::Tensor& map) {
  return {const_cast<float*>(map.const_data_ptr<float>()), row_stride(map)};
}

// The gradient of a batch norm, from the sums over all rows of grad and of grad * (x - mean): see `normalize_backward`.
struct NormGradient {
  at::Tensor scale, offset, slope, dweight, dbias;  // (C)
  Normalization n;

  NormGradient(const Statistics&, Activation);

  // `sums` is (2, C) in float64.
  void set(const Statistics&, const at::Tensor& sums, int64_t rows);
};

// (2, C) in float64, of (C) for every piece.
at::Tensor add_pieces(const Pieces&, int64_t channels, const float* sums, const float* products);

at::Tensor sums_of(const Normalization&, const at::Tensor& grad, const at::Tensor& map);

void check_same(const at::Tensor& tensor, const at::Tensor& map, const char* name);

at::Tensor normalize(
    const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, const at::Tensor& weight,
    const at::Tensor& bias, double eps, int64_t activation, const std::optional<at::Tensor>& residual);

std::tuple<at::Tensor, at::Tensor> normalize_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var,
    const at::Tensor& weight, const at::Tensor& bias, double eps, int64_t activation,
    const std::optional<at::Tensor>& sums, const at::Tensor& out);

constexpr int64_t kGroups = 16;  // partial sums of a weight's gradient, at most one for each image

// Partial sums (groups, size) of groups of images, made by `body(first image, last image, unit, partial sum)`, added up
// in an order that does not depend on the number of threads.
template <class Body>
void sum_images(int64_t images, int64_t units, int64_t size, float* total, Body body) {
  const int64_t groups = std::min(images, kGroups);
  const at::Tensor partial = floats(groups * size);
  float* sums = partial.mutable_data_ptr<float>();
  at::parallel_for(0, groups * size, 1 << 16, [&](int64_t begin, int64_t end) {
    std::fill(sums + begin, sums + end, 0.f);
  });
  at::parallel_for(0, groups * units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / units;
      body(group * images / groups, (group + 1) * images / groups, i % units, sums + group * size);
    }
  });
  at::parallel_for(0, size, 1 << 12, [&](int64_t begin, int64_t end) {
    std::fill(total + begin, total + end, 0.f);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = begin; i < end; ++i)
        total[i] += sums[group * size + i];
  });
}

}  // namespace mobilemamba
