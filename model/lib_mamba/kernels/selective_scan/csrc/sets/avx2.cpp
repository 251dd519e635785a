// The kernels for x86 processors with AVX2. Compiled for them by a pragma, so that one set of flags serves all files.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LANES 8

namespace mobilemamba {
namespace avx2 {

#include "cpu/vector.h"

#include "scan/cpu_kernels.h"

#include "layers/product_kernels.h"

#include "layers/depthwise_kernels.h"

#include "layers/norm_kernels.h"

}  // namespace avx2

const Kernels& avx2_kernels() {
  static const Kernels kernels = {
      "AVX2", LANES, avx2::scan, avx2::finish, avx2::finish_backward, avx2::scan_backward,
      avx2::num_blocks, avx2::work_size, avx2::dense, avx2::depthwise, avx2::wavelet, avx2::wavelet_work_size,
      avx2::moments, avx2::normalize, avx2::normalize_sums, avx2::normalize_backward, avx2::depthwise_input,
      avx2::depthwise_taps, avx2::wavelet_taps, avx2::dense_weight};
  return kernels;
}

}  // namespace mobilemamba

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
