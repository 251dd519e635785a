// The kernels of this processor, for the operators.
#pragma once

#include "cpu_kernel.h"

namespace mobilemamba {

constexpr int64_t kColumns = 16;  // what the rows of a weight are padded to: whole vectors of any instruction set

// The fastest kernels that PyTorch's own choice of instruction set (ATEN_CPU_CAPABILITY) allows.
const Kernels& kernels();

}  // namespace mobilemamba
