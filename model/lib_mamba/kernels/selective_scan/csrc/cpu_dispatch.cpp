#include "cpu_dispatch.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

namespace mobilemamba {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512")
      return avx512_kernels();
    if (capability == "AVX2")
      return avx2_kernels();
#endif
    return portable_kernels();
  }();
  return chosen;
}

}  // namespace mobilemamba

TORCH_LIBRARY_FRAGMENT(mobilemamba_kernels, m) {
  m.def("cpu_capability() -> str", []() -> std::string { return mobilemamba::kernels().name; });
}
