// What the operators of training share: a batch norm's statistics, and sums over images.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>

#include "cpu_dispatch.h"
#include "cpu_maps.h"
#include "cpu_share.h"

namespace mobilemamba {

constexpr int64_t kGroups = 16;  // partial sums of a weight's gradient, at most one for each image

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

// Partial sums (groups, size) of groups of images, made by `body(first image, last image, unit, partial sum, scratch)`,
// added up in an order that does not depend on the number of threads.
template <class Body>
void sum_images(int64_t images, int64_t units, int64_t size, float* total, int64_t scratch_size, Body body) {
  const int64_t groups = std::min(images, kGroups);
  const at::Tensor partial = floats(groups * size);
  float* sums = partial.mutable_data_ptr<float>();
  at::parallel_for(0, groups * size, 1 << 16, [&](int64_t begin, int64_t end) {
    std::fill(sums + begin, sums + end, 0.f);
  });
  share_with_scratch(groups * units, scratch_size, [&](int64_t i, float* scratch) {
    const int64_t group = i / units;
    body(group * images / groups, (group + 1) * images / groups, i % units, sums + group * size, scratch);
  });
  at::parallel_for(0, size, 1 << 12, [&](int64_t begin, int64_t end) {
    std::fill(total + begin, total + end, 0.f);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = begin; i < end; ++i)
        total[i] += sums[group * size + i];
  });
}

}  // namespace mobilemamba
