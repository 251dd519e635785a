// The states that the backward pass starts from, one position after the other.
#pragma once

#include "scan/cuda/chunks.h"
#include "scan/cuda/inputs.cuh"

namespace mobilemamba {

// Grid (B, groups of 32 channels, directions), a lane a channel.
template <typename T>
__global__ void states_kernel(const ScanInputs<T> p, float* states) {
  constexpr bool kExact = sizeof(T) == sizeof(float);
  const int64_t image = blockIdx.x;
  const int channel = blockIdx.y * kLanes + lane_index(), direction = blockIdx.z;
  if (channel >= p.channels)
    return;
  const int interval = chunk_length(p.length), count = num_states(p.length);
  const int64_t row = static_cast<int64_t>(direction) * p.channels + channel;
  const float A = -expf(p.A_log[row]);
  float state = 0.f;
  for (int step = 0; step < p.length; ++step) {
    const int position = direction ? p.length - 1 - step : step, chunk = position / interval;
    if (direction ? position == min((chunk + 1) * interval, p.length) - 1 : position % interval == 0)
      states[((image * 2 + direction) * count + chunk) * p.channels + channel] = state;
    const T* own = p.projection + (image * p.length + position) * p.width() + direction * (p.rank + 2);
    float raw = p.dt_bias[row];
    for (int r = 0; r < p.rank; ++r)
      raw = fmaf(p.dt_weight[row * p.rank + r], static_cast<float>(own[r]), raw);
    const float s = softplus2<kExact>(kLog2e * raw);
    const float x = static_cast<float>(p.x[(image * p.length + position) * p.x_row + channel]);
    state = advanced<kExact>(state, s, A, kLn2 * static_cast<float>(own[p.rank]), x);
  }
}

}  // namespace mobilemamba
