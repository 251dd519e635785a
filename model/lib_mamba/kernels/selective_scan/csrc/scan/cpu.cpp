// The scan on the CPU: arguments to addresses, work to threads, partial sums to gradients.
//
// Threads take whole images, or blocks of channels where there are few images. Sums over images and positions are
// made in an order that does not depend on the number of threads: results are the same for any number.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/share.h"
#include "scan/scan.h"

namespace mobilemamba {
namespace {

using at::Tensor;

constexpr int64_t kRows = 64;        // positions that are normalised as one piece of work
constexpr int64_t kMostGroups = 64;  // partial sums of the parameters' gradients, at most one for each image

// Skips conversions that would be no-ops: they take microseconds, as long as a short scan.
Tensor as_floats(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.is_contiguous() ? tensor : tensor.to(at::kFloat).contiguous();
}

// (K, D, n) with the channels side by side, rows of them behind one another.
Tensor channels_inside(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const bool is_inside = (sizes[1] == 1 || strides[1] == 1) && (sizes[2] == 1 || strides[2] == sizes[1]) &&
                         (sizes[0] == 1 || strides[0] == sizes[1] * sizes[2]);
  return tensor.scalar_type() == at::kFloat && is_inside ? tensor : tensor.to(at::kFloat).transpose(1, 2).contiguous();
}

Tensor unit_stride(const Tensor& tensor, at::ScalarType type) {
  const Tensor converted = tensor.scalar_type() == type ? tensor : tensor.to(type);
  return converted.stride(-1) == 1 || converted.size(-1) == 1 ? converted : converted.contiguous();
}

// The arguments of an operator in the form the kernels take them, and the tensors that keep them alive.
struct Call {
  Problem p{};
  Tensor x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias, grad;
  std::vector<int64_t> reverse;
  at::ScalarType type;

  Call(
      const Tensor& x_, const Tensor& projection_, const Tensor& dt_weight_, const Tensor& dt_bias_,
      const Tensor& A_log_, const Tensor& D_skip_, at::IntArrayRef reverse_, at::ScalarType type_)
      : type(type_) {
    TORCH_CHECK(x_.dim() == 3, "x has 3 dimensions, got ", x_.sizes());
    p.batch = x_.size(0), p.length = x_.size(1), p.channels = x_.size(2);
    take_parameters(dt_weight_, dt_bias_, A_log_, D_skip_, reverse_);
    TORCH_CHECK(projection_.numel() == p.batch * p.length * p.width(), "the projection does not fit the scan's x");
    x = unit_stride(x_, type);
    projection = as_floats(projection_);
    p.is_bfloat16 = type == at::kBFloat16;
    p.x = x.const_data_ptr(), p.x_batch = x.stride(0), p.x_row = x.stride(1);
    p.projection = projection.const_data_ptr<float>();
  }

  // Of sequences by address.
  explicit Call(const Problem& problem) : p(problem), type(at::kFloat) {}

  void take_parameters(
      const Tensor& dt_weight_, const Tensor& dt_bias_, const Tensor& A_log_, const Tensor& D_skip_,
      at::IntArrayRef reverse_) {
    TORCH_CHECK(dt_weight_.dim() == 3 && A_log_.dim() == 2, "dt_weight has 3 dimensions, A_log 2");
    reverse = reverse_.vec();
    p.directions = dt_weight_.size(0), p.rank = dt_weight_.size(2), p.states = A_log_.size(1);
    const auto K = p.directions, D = p.channels;
    TORCH_CHECK(
        static_cast<int64_t>(reverse.size()) == K && dt_weight_.size(1) == D && dt_bias_.numel() == K * D &&
            A_log_.size(0) == K * D && D_skip_.numel() == K * D,
        "the arguments of the scan do not fit together");
    dt_weight = channels_inside(dt_weight_);
    dt_bias = as_floats(dt_bias_);
    A_log = p.states == 1 ? as_floats(A_log_) : channels_inside(A_log_.reshape({K, D, p.states}));
    D_skip = as_floats(D_skip_);
    p.reverse = reverse.data();
    p.dt_weight = dt_weight.const_data_ptr<float>();
    p.dt_bias = dt_bias.const_data_ptr<float>();
    p.A_log = A_log.const_data_ptr<float>();
    p.D_skip = D_skip.const_data_ptr<float>();
  }

  void gate(const Tensor& z_, const Tensor& norm_weight_, const Tensor& norm_bias_, double eps) {
    TORCH_CHECK(z_.dim() == 3 && z_.numel() == x.numel(), "the arguments of the gate do not fit the scan's");
    z = unit_stride(z_, type);
    p.z = z.const_data_ptr(), p.z_batch = z.stride(0), p.z_row = z.stride(1);
    take_norm(norm_weight_, norm_bias_, eps);
  }

  void take_norm(const Tensor& norm_weight_, const Tensor& norm_bias_, double eps) {
    TORCH_CHECK(
        norm_weight_.numel() == p.channels && norm_bias_.numel() == p.channels,
        "the arguments of the gate do not fit the scan's");
    norm_weight = as_floats(norm_weight_);
    norm_bias = as_floats(norm_bias_);
    p.is_gated = true;
    p.norm_weight = norm_weight.const_data_ptr<float>();
    p.norm_bias = norm_bias.const_data_ptr<float>();
    p.eps = static_cast<float>(eps);
  }

  void differentiate(const Tensor& grad_) {
    TORCH_CHECK(grad_.dim() == 3 && grad_.numel() == x.numel(), "the gradient does not fit the scan's output");
    grad = unit_stride(grad_, p.is_gated ? type : at::kFloat);
    p.grad = grad.const_data_ptr(), p.grad_batch = grad.stride(0), p.grad_row = grad.stride(1);
  }

  Tensor like_x(at::ScalarType of) const { return at::empty(x.sizes(), x.options().dtype(of)); }
};

// Channels in whole vectors: a row of a scratch image, and of a partial sum.
int64_t padded_channels(const Problem& p) {
  return num_vectors(p.channels) * kernels().lanes;
}

void forward(const Problem& p) {
  const Kernels& kernel = kernels();
  const int64_t blocks = kernel.num_blocks(p.channels), image_size = padded_channels(p) * p.length;
  const int64_t work_size = kernel.work_size(p, false);
  if (is_balanced(p.batch)) {
    share_with_scratch(p.batch, work_size + image_size, [&](int64_t image, float* work) {
      float* sums = work + work_size;
      for (int64_t block = 0; block < blocks; ++block)
        kernel.scan(p, image, block, sums, work);
      kernel.finish(p, image, 0, p.length, sums, work);
    });
    return;
  }
  const Tensor scratch = floats(p.batch * image_size);
  float* sums = scratch.mutable_data_ptr<float>();
  share_with_scratch(p.batch * blocks, work_size, [&](int64_t i, float* work) {
    kernel.scan(p, i / blocks, i % blocks, sums + i / blocks * image_size, work);
  });
  const Strips strips{p.length, kRows};
  share_with_scratch(p.batch * strips.count(), work_size, [&](int64_t i, float* work) {
    const int64_t image = i / strips.count(), strip = i % strips.count();
    kernel.finish(p, image, strips.begin(strip), strips.end(strip), sums + image * image_size, work);
  });
}

// Partial sums of the parameters' gradients: one row of them for each group of images, in the images' order.
struct Partials {
  int64_t groups, channels, width, size;                        // width of D padded, size of a row
  int64_t weight, bias, A_log, D_skip, norm_weight, norm_bias;  // where each begins in a row
  Tensor rows;

  explicit Partials(const Problem& p) : groups(std::min(p.batch, kMostGroups)), channels(p.channels) {
    width = padded_channels(p);
    weight = 0;
    bias = weight + p.directions * p.rank * width;
    A_log = bias + p.directions * width;
    D_skip = A_log + p.directions * p.states * width;
    norm_weight = D_skip + width;
    norm_bias = norm_weight + width;
    size = norm_bias + width;
    rows = at::zeros({groups, size}, at::TensorOptions(at::kFloat));
  }

  float* row(int64_t group) const { return rows.mutable_data_ptr<float>() + group * size; }

  ParameterSums sums(int64_t group) const {
    return {row(group) + weight, row(group) + bias, row(group) + A_log, row(group) + D_skip};
  }

  // Sums (outer, inner, D) that begin at `start`, over the groups, as (outer, D, inner).
  Tensor total(int64_t start, int64_t outer, int64_t inner, const Tensor& like) const {
    const Tensor result = at::empty(like.sizes(), like.options().dtype(at::kFloat));
    float* out = result.mutable_data_ptr<float>();
    share_range(outer * inner, 8, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(channels);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(sum.begin(), sum.end(), 0.f);
        for (int64_t group = 0; group < groups; ++group)
          add(sum.data(), row(group) + start + i * width, channels);
        for (int64_t d = 0; d < channels; ++d)
          out[(i / inner * channels + d) * inner + i % inner] = sum[d];
      }
    });
    return result.to(like.scalar_type());
  }
};

// Whole groups of images on each thread.
void backward_by_groups(const Problem& p, float* dprojection, const Partials& partials) {
  const Kernels& kernel = kernels();
  const int64_t blocks = kernel.num_blocks(p.channels), width = padded_channels(p), image_size = width * p.length;
  const int64_t work_size = kernel.work_size(p, true);
  const Strips strips{p.length, kRows};
  share_with_scratch(partials.groups, work_size + image_size + 2 * width, [&](int64_t group, float* work) {
    float *sums = work + work_size, *norm = sums + image_size;
    const int64_t last_image = (group + 1) * p.batch / partials.groups;
    for (int64_t image = group * p.batch / partials.groups; image < last_image; ++image) {
      for (int64_t block = 0; block < blocks && p.is_gated; ++block)
        kernel.scan(p, image, block, sums, work);
      for (int64_t strip = 0; strip < strips.count(); ++strip) {
        std::fill(norm, norm + 2 * width, 0.f);
        kernel.finish_backward(p, image, strips.begin(strip), strips.end(strip), sums, norm, norm + width, work);
        add(partials.row(group) + partials.norm_weight, norm, 2 * width);
      }
      for (int64_t block = 0; block < blocks; ++block)
        kernel.scan_backward(
            p, image, block, sums, dprojection + image * p.length * p.width(), partials.sums(group), work);
    }
  });
}

// Blocks of channels, or rows, of all images at once; each image is a group.
void backward_by_blocks(const Problem& p, float* dprojection, const Partials& partials) {
  const Kernels& kernel = kernels();
  const int64_t blocks = kernel.num_blocks(p.channels), width = padded_channels(p), image_size = width * p.length;
  const int64_t work_size = kernel.work_size(p, true), projection_size = p.length * p.width();
  const Strips strips{p.length, kRows};
  const Tensor sums_of_all = floats(p.batch * image_size);
  const Tensor norms = at::zeros({p.batch * strips.count() * 2 * width}, at::TensorOptions(at::kFloat));
  const Tensor projections = at::zeros({p.batch * blocks * projection_size}, at::TensorOptions(at::kFloat));
  float* sums = sums_of_all.mutable_data_ptr<float>();
  float* norm = norms.mutable_data_ptr<float>();
  float* shares = projections.mutable_data_ptr<float>();
  if (p.is_gated)
    share_with_scratch(p.batch * blocks, work_size, [&](int64_t i, float* work) {
      kernel.scan(p, i / blocks, i % blocks, sums + i / blocks * image_size, work);
    });
  share_with_scratch(p.batch * strips.count(), work_size, [&](int64_t i, float* work) {
    const int64_t image = i / strips.count(), strip = i % strips.count();
    float *from = sums + image * image_size, *dnorm = norm + i * 2 * width;
    kernel.finish_backward(p, image, strips.begin(strip), strips.end(strip), from, dnorm, dnorm + width, work);
  });
  share_with_scratch(p.batch * blocks, work_size, [&](int64_t i, float* work) {
    kernel.scan_backward(
        p, i / blocks, i % blocks, sums + i / blocks * image_size, shares + i * projection_size,
        partials.sums(i / blocks), work);
  });
  share(p.batch, kForwards, [&](int64_t image) {
    for (int64_t strip = 0; strip < strips.count(); ++strip)
      add(partials.row(image) + partials.norm_weight, norm + (image * strips.count() + strip) * 2 * width, 2 * width);
    for (int64_t block = 0; block < blocks; ++block)
      add(dprojection + image * projection_size, shares + (image * blocks + block) * projection_size, projection_size);
  });
}

// Fills dx (and dz) and returns the sums.
Partials backward(const Problem& p, const Tensor& dprojection) {
  Partials partials(p);
  float* out = dprojection.mutable_data_ptr<float>();
  if (is_balanced(partials.groups) || partials.groups < p.batch)
    backward_by_groups(p, out, partials);
  else
    backward_by_blocks(p, out, partials);
  return partials;
}

at::ScalarType element_type(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kBFloat16, "the CPU kernel takes float32 and bfloat16, got ", tensor.dtype());
  return type;
}

// The type that holds both x and z.
at::ScalarType element_type(const Tensor& x, const Tensor& z) {
  return element_type(x) == element_type(z) ? x.scalar_type() : at::kFloat;
}

}  // namespace

Tensor selective_scan(
    const Tensor& x, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
    const Tensor& D_skip, at::IntArrayRef reverse) {
  Call call(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse, element_type(x));
  const Tensor y = call.like_x(at::kFloat);
  call.p.y = y.mutable_data_ptr();
  forward(call.p);
  return y;
}

ScanGradients selective_scan_backward(
    const Tensor& grad, const Tensor& x, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, at::IntArrayRef reverse) {
  Call call(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse, element_type(x));
  call.differentiate(grad);
  const Tensor dx = call.like_x(call.type);
  call.p.dx = dx.mutable_data_ptr();
  const Tensor dprojection = at::zeros(projection.sizes(), call.projection.options());
  const Partials sums = backward(call.p, dprojection);
  const auto K = call.p.directions;
  return {
      dx,
      dprojection.to(projection.scalar_type()),
      sums.total(sums.weight, K, call.p.rank, dt_weight),
      sums.total(sums.bias, K, 1, dt_bias),
      sums.total(sums.A_log, K, call.p.states, A_log),
      sums.total(sums.D_skip, 1, 1, D_skip.slice(0, 0, call.p.channels)).repeat({K}),
  };
}

Tensor gated_scan(
    const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    at::IntArrayRef reverse) {
  Call call(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse, element_type(x, z));
  call.gate(z, norm_weight, norm_bias, eps);
  const Tensor y = call.like_x(call.type);
  call.p.y = y.mutable_data_ptr();
  forward(call.p);
  return y.to(x.scalar_type());
}

void gated_scan_into(
    const Problem& p, const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log, const Tensor& D_skip,
    const Tensor& norm_weight, const Tensor& norm_bias, double eps, at::IntArrayRef reverse, int64_t width) {
  Call call(p);
  call.take_parameters(dt_weight, dt_bias, A_log, D_skip, reverse);
  TORCH_CHECK(width == call.p.width(), "the projection does not fit the scan's parameters");
  call.take_norm(norm_weight, norm_bias, eps);
  forward(call.p);
}

ScanWithStates gated_scan_with_states(
    const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias,
    const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    at::IntArrayRef reverse) {
  const Tensor y =
      gated_scan(x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias, eps, reverse);
  const auto floats = x.options().dtype(at::kFloat);
  return {y, at::empty({x.size(0), 2, 0, x.size(2)}, floats), at::empty({x.size(0), 0, 2}, floats)};
}

GatedGradients gated_scan_backward(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& projection, const Tensor& dt_weight,
    const Tensor& dt_bias, const Tensor& A_log, const Tensor& D_skip, const Tensor& norm_weight,
    const Tensor& norm_bias, double eps, at::IntArrayRef reverse, const std::optional<Tensor>&,
    const std::optional<Tensor>&) {
  Call call(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse, element_type(x, z));
  call.gate(z, norm_weight, norm_bias, eps);
  call.differentiate(grad);
  const Tensor dx = call.like_x(call.type), dz = call.like_x(call.type);
  call.p.dx = dx.mutable_data_ptr();
  call.p.dz = dz.mutable_data_ptr();
  const Tensor dprojection = at::zeros(projection.sizes(), call.projection.options());
  const Partials sums = backward(call.p, dprojection);
  const auto K = call.p.directions;
  return {
      dx.to(x.scalar_type()),
      dz.to(z.scalar_type()),
      dprojection.to(projection.scalar_type()),
      sums.total(sums.weight, K, call.p.rank, dt_weight),
      sums.total(sums.bias, K, 1, dt_bias),
      sums.total(sums.A_log, K, call.p.states, A_log),
      sums.total(sums.D_skip, 1, 1, D_skip.slice(0, 0, call.p.channels)).repeat({K}),
      sums.total(sums.norm_weight, 1, 1, norm_weight),
      sums.total(sums.norm_bias, 1, 1, norm_bias),
  };
}

}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("selective_scan", mobilemamba::selective_scan);
  m.impl("selective_scan_backward", mobilemamba::selective_scan_backward);
  m.impl("gated_scan", mobilemamba::gated_scan);
  m.impl("gated_scan_with_states", mobilemamba::gated_scan_with_states);
  m.impl("gated_scan_backward", mobilemamba::gated_scan_backward);
}
