// CUDA on the CPU, as far as the scan kernels need it, for tests without a GPU.
//
// Every thread of a block is a fiber; it runs until it waits for its warp or its block. The order in which fibers run is
// shuffled at every step, shared memory starts as NaN and a barrier that not all threads reach ends in an error: missing
// barriers, divergent ones and reads of what was never written are found. Kernels are included as source, after this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
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

inline float rsqrtf(float value) {
  return 1.f / std::sqrt(value);
}

// Of the thread that is running.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
float __shfl_xor_sync(unsigned mask, float value, int lanes);

namespace emulator {
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
}

using cudaError_t = int;
using cudaStream_t = int;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaFuncSetAttribute(const void*, int, int) {
  return 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulator::run(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, [&]() { kernel(Parameters(arguments)...); });
  return 0;
}

// In place of device.cuh.
#define MOBILEMAMBA_DEVICE_CUH

namespace mobilemamba {

inline float fast_exp2(float value) {
  return std::exp2(value);
}

inline float fast_log2(float value) {
  return std::log2(value);
}

inline float fast_reciprocal(float value) {
  return 1.f / value;
}

float round_tf32(float value);
void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]);
float* shared_memory();

}  // namespace mobilemamba
