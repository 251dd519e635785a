// Types, layouts, checks and launches for the host code of the CUDA operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <utility>

#include "scan/scan.h"

namespace mobilemamba {

using at::Tensor;

constexpr size_t kPlainSharedBytes = 48 * 1024;  // beyond this a kernel must ask
constexpr unsigned kPortableCluster = 8;         // and beyond this for its clusters

// What a launch needs besides the arguments: blocks of threads, in clusters of some.
struct Launch {
  dim3 grid;
  int threads, shared_floats;
  unsigned cluster = 1;
};

// A launch as CUDA takes it, for as long as this object lives.
class LaunchConfig {
 public:
  template <typename... Parameters>
  LaunchConfig(void (*kernel)(Parameters...), const Launch& launch) {
    const auto address = reinterpret_cast<const void*>(kernel);
    config.gridDim = launch.grid;
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = sizeof(float) * launch.shared_floats;
    config.stream = c10::cuda::getCurrentCUDAStream();
    if (config.dynamicSmemBytes > kPlainSharedBytes)
      C10_CUDA_CHECK(cudaFuncSetAttribute(
          address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.dynamicSmemBytes)));
    if (launch.cluster > kPortableCluster)
      C10_CUDA_CHECK(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    if (launch.cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {launch.cluster, 1, 1};
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;

  cudaLaunchConfig_t config{};

 private:
  cudaLaunchAttribute attribute{};
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& launch, Arguments&&... arguments) {
  const LaunchConfig own(kernel, launch);
  C10_CUDA_CHECK(cudaLaunchKernelEx(&own.config, kernel, std::forward<Arguments>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_floats, Arguments&&... arguments) {
  launch(kernel, Launch{grid, threads, shared_floats}, std::forward<Arguments>(arguments)...);
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, c10::cuda::current_device()));
  return value;
}

inline int num_multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Clusters of a launch that run at the same time; 0 if the device cannot run it.
template <typename... Parameters>
int num_clusters(void (*kernel)(Parameters...), const Launch& launch) {
  const auto address = reinterpret_cast<const void*>(kernel);
  int count = 0;
  const LaunchConfig own(kernel, launch);
  const cudaError_t error = launch.cluster > 1 ? cudaOccupancyMaxActiveClusters(&count, address, &own.config)
                                               : cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                                                     &count, address, launch.threads, own.config.dynamicSmemBytes);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return launch.cluster > 1 ? count : count * num_multiprocessors();
}

inline bool fits_shared(int floats) {
  return sizeof(float) * floats <= static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <typename Integer>
constexpr Integer ceil_div(Integer count, Integer size) {
  return (count + size - 1) / size;
}

// Call `function` with a zero of the type.
template <typename Function>
void with_type(at::ScalarType type, Function&& function) {
  if (type == at::kFloat)
    function(0.f);
  else if (type == at::kHalf)
    function(c10::Half(0.f));
  else if (type == at::kBFloat16)
    function(c10::BFloat16(0.f));
  else
    TORCH_CHECK(false, "x must be float32, float16 or bfloat16, got ", type);
}

// (B, L, D) as rows (B * L, D) of unit stride: a view where the strides allow it.
inline Tensor as_rows(const Tensor& tensor, at::ScalarType type) {
  const Tensor rows = tensor.to(type).flatten(0, 1);
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

inline Tensor as_floats(const Tensor& tensor) {
  return tensor.to(at::kFloat).contiguous();
}

inline Tensor empty_floats(at::IntArrayRef shape, const Tensor& like) {
  return at::empty(shape, like.options().dtype(at::kFloat));
}

// Results may not share memory, as parts of one sum do.
inline Tensor copy_of(const Tensor& part) {
  return part.clone(at::MemoryFormat::Contiguous);
}

inline int row_step(const Tensor& rows) {
  return static_cast<int>(rows.stride(0));
}

// Raise unless the arguments of a scan fit together.
inline void check_scan(
    const Tensor& x, const Tensor& projection, const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
    const Tensor& D_skip, at::IntArrayRef reverse) {
  TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, "x must be (B, L, D) with L >= 1, got ", x.sizes());
  TORCH_CHECK(dt_weight.dim() == 3, "dt_weight must be (K, D, R), got ", dt_weight.sizes());
  TORCH_CHECK(A_log.dim() == 2, "A_log must be (K * D, N), got ", A_log.sizes());
  const auto B = x.size(0), L = x.size(1), D = x.size(2), K = dt_weight.size(0), R = dt_weight.size(2);
  const auto N = A_log.size(1);
  TORCH_CHECK(dt_weight.size(1) == D, "dt_weight must be (K, D, R) with D = ", D, ", got ", dt_weight.sizes());
  TORCH_CHECK(
      projection.sizes() == at::IntArrayRef({B, L, K * (R + 2 * N)}), "projection must be (B, L, K * (R + 2 N)), got ",
      projection.sizes());
  TORCH_CHECK(dt_bias.sizes() == at::IntArrayRef({K, D}), "dt_bias must be (K, D), got ", dt_bias.sizes());
  TORCH_CHECK(A_log.size(0) == K * D, "A_log must be (K * D, N), got ", A_log.sizes());
  TORCH_CHECK(D_skip.sizes() == at::IntArrayRef({K * D}), "D_skip must be (K * D,), got ", D_skip.sizes());
  TORCH_CHECK(static_cast<int64_t>(reverse.size()) == K, "reverse must have K = ", K, " entries");
  for (const Tensor& tensor : {projection, dt_weight, dt_bias, A_log, D_skip})
    TORCH_CHECK(tensor.device() == x.device(), "all tensors must be on ", x.device(), ", one is on ", tensor.device());
}

}  // namespace mobilemamba
