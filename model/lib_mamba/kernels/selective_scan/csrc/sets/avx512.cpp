// The kernels for x86 processors with AVX-512. Compiled for them by a pragma, so that one set of flags serves all files.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define LANES 16

namespace mobilemamba {
namespace avx512 {

#include "cpu/vector.h"

#include "scan/cpu_kernels.h"

#include "layers/product_kernels.h"

#include "layers/depthwise_kernels.h"

#include "layers/norm_kernels.h"

}  // namespace avx512

const Kernels& avx512_kernels() {
  static const Kernels kernels = {
      "AVX-512", LANES, avx512::scan, avx512::finish, avx512::finish_backward, avx512::scan_backward,
      avx512::num_blocks, avx512::work_size, avx512::dense, avx512::depthwise, avx512::wavelet,
      avx512::wavelet_work_size, avx512::moments, avx512::normalize, avx512::normalize_sums,
      avx512::normalize_backward, avx512::depthwise_input, avx512::depthwise_taps, avx512::wavelet_taps, avx512::dense_weight};
  return kernels;
}

}  // namespace mobilemamba

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
