// The operators of the library. Implementations are registered where they are defined, in scan/ and layers/.
#include <torch/library.h>

#include <string>

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
  // Also what the backward pass starts from, float32: some states (B, 2, count, D), and mean and 1 / deviation over the
  // channels of every position's sum (B, L, 2). A backend may keep neither.
  m.def(
      "gated_scan_with_states(Tensor x, Tensor z, Tensor projection, Tensor dt_weight, Tensor dt_bias, Tensor A_log, "
      "Tensor D_skip, Tensor norm_weight, Tensor norm_bias, float eps, int[] reverse) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_scan_backward(Tensor grad, Tensor x, Tensor z, Tensor projection, Tensor dt_weight, Tensor dt_bias, "
      "Tensor A_log, Tensor D_skip, Tensor norm_weight, Tensor norm_bias, float eps, int[] reverse, "
      "Tensor? states=None, Tensor? statistics=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  // The layers of a folded network. Activations: 0 none, 1 ReLU, 2 SiLU.
  m.def("pointwise(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int activation) -> Tensor");
  m.def(
      "ffn(Tensor x, Tensor? taps, Tensor? taps_bias, Tensor first_weight, Tensor first_bias, Tensor second_weight, "
      "Tensor second_bias, Tensor? residual=None) -> Tensor");
  m.def("convs(Tensor x, Tensor[] weights, Tensor[] biases, int side, int stride, int padding) -> Tensor");
  m.def(
      "depthwise(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int stride, int padding, "
      "int activation) -> Tensor");
  m.def("wavelet(Tensor x, Tensor weight, Tensor base) -> Tensor");
  m.def("means(Tensor x) -> Tensor");
  m.def(
      "squeeze_excite(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias) "
      "-> Tensor");
  m.def("mixer(Tensor x, Tensor[] parameters, int[] split, int[] reverse, float norm_eps) -> Tensor");
  // Groups of these (layers/blocks.cpp).
  m.def("block(Tensor x, Tensor[] parameters, int[] split, int[] reverse, float norm_eps) -> Tensor");
  m.def("patch_merging(Tensor x, Tensor[] parameters) -> Tensor");
  // All of them (layers/network.cpp).
  m.def(
      "network(Tensor x, Tensor[] parameters, int[] stem, int[] layers, int[] split, int[] reverse, float norm_eps) "
      "-> Tensor");
  // Weights in the layouts that the layers read (layers/weights.h).
  m.def("pack_columns(Tensor weight) -> Tensor");
  m.def("pack_depthwise(Tensor weight) -> Tensor");
  m.def("pack_bands(Tensor weight) -> Tensor");
  // Groups of layers in training (layers/steps.h). `running` holds mean, variance and number of batches of each norm.
  // They return the output and the tensors to keep; backward, the gradients of x and of the parameters.
  for (const std::string step :
       {"depthwise_ffn", "pointwise", "expand_and_stride", "squeeze_excite", "stem", "mixer"}) {
    const std::string more = step == "mixer" ? ", int[] split, int[] reverse, float norm_eps" : "";
    const std::string forward =
        "_step(Tensor x, Tensor[] parameters, Tensor(a!)[] running, float[] momenta, float[] eps" + more +
        ") -> (Tensor, Tensor[])";
    const std::string backward =
        "_step_backward(Tensor grad, Tensor x, Tensor[] saved, Tensor[] parameters" + more + ") -> Tensor[]";
    m.def((step + forward).c_str());
    m.def((step + backward).c_str());
  }
}
