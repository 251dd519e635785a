// The kernels for any processor: vectors of four, as the compiler's baseline (SSE2, NEON) has them.
#include "cpu/kernels.h"

#define LANES 4

namespace mobilemamba {
namespace portable {

#include "cpu/vector.h"

#include "scan/cpu_kernels.h"

#include "layers/product_kernels.h"

#include "layers/depthwise_kernels.h"

#include "layers/norm_kernels.h"

}  // namespace portable

const Kernels& portable_kernels() {
  static const Kernels kernels = {
      "portable", LANES, portable::scan, portable::finish, portable::finish_backward, portable::scan_backward,
      portable::num_blocks, portable::work_size, portable::dense, portable::depthwise, portable::wavelet,
      portable::wavelet_work_size, portable::moments, portable::normalize, portable::normalize_sums,
      portable::normalize_backward, portable::depthwise_input, portable::depthwise_taps,
      portable::wavelet_taps, portable::dense_weight};
  return kernels;
}

}  // namespace mobilemamba
