// The CUDA implementations of the scan's operators.
#include <torch/library.h>

#include "scan/scan.h"

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CUDA, m) {
  m.impl("selective_scan", &mobilemamba::selective_scan_cuda);
  m.impl("selective_scan_backward", &mobilemamba::selective_scan_backward_cuda);
  m.impl("gated_scan", &mobilemamba::gated_scan_cuda);
  m.impl("gated_scan_with_states", &mobilemamba::gated_scan_with_states_cuda);
  m.impl("gated_scan_backward", &mobilemamba::gated_scan_backward_cuda);
}
