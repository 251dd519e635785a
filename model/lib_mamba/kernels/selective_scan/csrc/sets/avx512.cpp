// The kernels for x86 processors with AVX-512: compiled for them by a pragma, so that one set of flags serves all
// files.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define NAME "AVX-512"
#define LANES 16

namespace mobilemamba {
namespace avx512 {

#include "sets/table.h"

}  // namespace avx512

const Kernels& avx512_kernels() {
  return avx512::TABLE;
}

}  // namespace mobilemamba

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
