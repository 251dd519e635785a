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
  // The layers of a folded network. Activations: 0 none, 1 ReLU, 2 SiLU.
  m.def("pointwise(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int activation) -> Tensor");
  m.def(
      "ffn(Tensor x, Tensor? taps, Tensor? taps_bias, Tensor first_weight, Tensor first_bias, Tensor second_weight, "
      "Tensor second_bias) -> Tensor");
  m.def("convs(Tensor x, Tensor[] weights, Tensor[] biases, int side, int stride, int padding) -> Tensor");
  m.def(
      "depthwise(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int stride, int padding, "
      "int activation) -> Tensor");
  m.def("wavelet(Tensor x, Tensor weight, Tensor base) -> Tensor");
  // What the layers are trained with.
  m.def(
      "moments(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum) "
      "-> (Tensor mean, Tensor var)");
  m.def(
      "normalize(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, int activation, "
      "Tensor? residual) -> Tensor");
  m.def(
      "normalize_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, "
      "int activation, Tensor(a!) out) -> (Tensor dweight, Tensor dbias)");
  m.def("product(Tensor x, Tensor weight) -> Tensor");
  m.def("product_backward(Tensor grad, Tensor x, Tensor weight, Tensor? base) -> (Tensor dx, Tensor dweight)");
  m.def(
      "depthwise_backward(Tensor grad, Tensor x, Tensor weight, int stride, Tensor? base) "
      "-> (Tensor dx, Tensor dweight)");
  // Of act(norm(x)), with gradients of that.
  m.def(
      "strided_conv(Tensor x, Tensor mean, Tensor var, Tensor scale, Tensor shift, float eps, Tensor weight) -> Tensor");
  m.def(
      "strided_conv_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor scale, Tensor shift, float eps, "
      "Tensor weight) -> (Tensor dx, Tensor dweight)");
  m.def("wavelet_taps(Tensor grad, Tensor x, int side) -> Tensor");
}
