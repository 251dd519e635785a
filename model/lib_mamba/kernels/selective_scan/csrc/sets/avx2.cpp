// The kernels for x86 processors with AVX2: compiled for them by a pragma, so that one set of flags serves all files.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define NAME "AVX2"
#define LANES 8

namespace mobilemamba {
namespace avx2 {

#include "sets/table.h"

}  // namespace avx2

const Kernels& avx2_kernels() {
  return avx2::TABLE;
}

}  // namespace mobilemamba

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
