// A step: a group of layers in training, as one operator forward and one backward.
//
// Forward, a step takes its input, its parameters and its batch norms, which measure the batch and move their running
// statistics; it returns the output and the tensors that the backward pass needs besides input and parameters.
// Backward, it returns the gradients of the input and of the parameters, in their order.
//
// A step keeps the maps that its batch norms read; the backward pass normalises them again. That is less to keep, and
// less to fetch, than keeping the results of the norms too.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "layers/layers.h"

namespace mobilemamba {

using Tensors = std::vector<at::Tensor>;
using Doubles = at::ArrayRef<double>;

// The output, and the tensors to keep.
using Output = std::tuple<at::Tensor, Tensors>;

// Steps call operators below autograd.
using WithoutAutograd = at::AutoDispatchBelowADInplaceOrView;

inline void check_count(at::TensorList tensors, size_t count, const char* name) {
  TORCH_CHECK(tensors.size() == count, tensors.size(), " ", name, " instead of ", count);
}

// The batch norms of a step, in the order of its layers.
struct Norms {
  at::TensorList running;  // mean, variance and number of batches of each
  Doubles momenta;         // negative: the mean of all batches
  Doubles eps;

  Norms(at::TensorList running, Doubles momenta, Doubles eps, size_t count);

  // The norm number `i`, measured on a map.
  Norm measure(int64_t i, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) const;
};

}  // namespace mobilemamba
