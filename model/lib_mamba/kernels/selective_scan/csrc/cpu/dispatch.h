// The kernels of this processor, and how operators give them vectors, threads and scratch memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"

namespace mobilemamba {

// The fastest kernels that PyTorch's own choice of instruction set (ATEN_CPU_CAPABILITY) allows.
const Kernels& kernels();

// How many vectors hold some channels.
int64_t num_vectors(int64_t channels);

// How many panels hold some columns of a product's weight.
int64_t num_panels(int64_t columns);

// New memory for so many floats.
at::Tensor floats(int64_t count);

// Whether threads get whole units of work each; else the units are split.
bool is_balanced(int64_t units);

}  // namespace mobilemamba
