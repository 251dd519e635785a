#include "cpu/dispatch.h"

#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "cpu/pool.h"

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

int64_t num_vectors(int64_t channels) {
  return ceil_div(channels, kernels().lanes);
}

int64_t num_panels(int64_t columns) {
  return Panels{num_vectors(columns)}.count();
}

at::Tensor floats(int64_t count) {
  return at::empty({count}, at::TensorOptions(at::kFloat));
}

bool is_balanced(int64_t units) {
  return units % num_threads() == 0 || units >= 4 * num_threads();
}

}  // namespace mobilemamba

TORCH_LIBRARY_FRAGMENT(mobilemamba_kernels, m) {
  m.def("cpu_capability() -> str", []() -> std::string { return mobilemamba::kernels().name; });
}
