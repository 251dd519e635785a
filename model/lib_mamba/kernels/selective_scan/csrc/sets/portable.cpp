// The kernels for any processor: vectors of four, as the compiler's baseline (SSE2, NEON) has them.
#include "cpu/kernels.h"

#if defined(__aarch64__)
#define NAME "NEON"
#else
#define NAME "portable"
#endif
#define LANES 4

namespace mobilemamba {
namespace portable {

#include "sets/table.h"

}  // namespace portable

const Kernels& portable_kernels() {
  return portable::TABLE;
}

}  // namespace mobilemamba
