// The part of CUDA that the kernels use, for a C++ compiler: threads are fibers of one CPU thread (fibers.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
float __shfl_xor_sync(unsigned mask, float value, int lane_mask);

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int min(int a, int b) {
  return std::min(a, b);
}
inline unsigned min(unsigned a, unsigned b) {
  return std::min(a, b);
}
inline int max(int a, int b) {
  return std::max(a, b);
}
inline float rsqrtf(float value) {
  return 1.f / std::sqrt(value);
}

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  int stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch
};

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared);
cudaError_t cudaGetLastError();

namespace cuda_on_cpu {

// Run `thread` once for every thread of every block. Raises where the GPU would refuse, or wait forever.
void run_kernel(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread);

float* shared_memory();

// The shared memory of another block of the cluster, which must still be running.
const float* shared_memory_of(int rank);

// The barrier of a cluster's threads, in two parts.
void cluster_arrive();
void cluster_wait();

// 16 bytes, or zeros for a null pointer, that arrive when this thread waits for them.
void copy_ahead(float4* to, const void* from);
void wait_for_copies();

// Note what the accessors of global memory move: lanes that name the same word in the same load share it.
void count_load(const void* word);
void count_store(int64_t bytes);

// The tensor cores' product of a warp's fragments.
void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]);

}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cuda_on_cpu::run_kernel(
      reinterpret_cast<const void*>(kernel), *config, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}
