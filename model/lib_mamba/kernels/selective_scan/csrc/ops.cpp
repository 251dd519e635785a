// The operators of the library; each device's implementation registers itself beside its code.
#include <torch/library.h>

TORCH_LIBRARY(mobilemamba_kernels, m) {
  m.def(
      "selective_scan(Tensor x, Tensor projection, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D_skip, "
      "int[] reverse) -> Tensor");
  m.def(
      "selective_scan_backward(Tensor grad, Tensor x, Tensor projection, Tensor dt_weight, Tensor dt_bias, "
      "Tensor A_log, Tensor D_skip, int[] reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_scan(Tensor x, Tensor z, Tensor projection, Tensor dt_weight, Tensor dt_bias, Tensor A_log, "
      "Tensor D_skip, Tensor norm_weight, Tensor norm_bias, float eps, int[] reverse) -> Tensor");
  m.def(
      "gated_scan_backward(Tensor grad, Tensor x, Tensor z, Tensor projection, Tensor dt_weight, Tensor dt_bias, "
      "Tensor A_log, Tensor D_skip, Tensor norm_weight, Tensor norm_bias, float eps, int[] reverse) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
