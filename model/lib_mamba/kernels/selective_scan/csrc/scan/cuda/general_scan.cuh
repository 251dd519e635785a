// The scan in any number of directions K with up to 16 state components N and any rank R: simple rather than fast.
//
// A thread has a channel, a block 128 channels of an image; one direction runs after the other. The sequence goes by in
// chunks of T positions, few enough that a chunk's N * T states stay in registers in the backward pass.
#pragma once

#include "scan/cuda/step.cuh"

namespace mobilemamba {

constexpr int kGeneralThreads = 128;
constexpr int kMaxStates = 16;

__host__ __device__ constexpr int general_chunk(int num_states) {
  return num_states <= 4 ? 16 : 64 / num_states;
}

template <typename T>
struct GeneralInputs {
  const T* x;  // (B * L) rows of D
  int x_row;
  const T* projection;     // (B, L, K * (R + 2 N))
  const float* dt_weight;  // (K, R, D): transposed, so that neighbours in a warp read neighbours in memory
  const float* dt_bias;    // (K, D)
  const float* A_log;      // (K, D, N)
  const float* D_skip;     // (K, D)
  int64_t reverse;         // bit k: direction k runs from the last position to the first
  int batch, length, channels, rank, directions, states;

  __host__ __device__ int columns() const { return rank + 2 * states; }
};

struct GeneralOutputs {
  float* y;            // (B, L, D), going forward
  const float* dy;     // (B, L, D), the rest going backward
  float* dx;           // (B, L, D)
  float* dprojection;  // (blocks of channels, B, L, K * (R + 2 N))
  float* ddt_weight;   // (B, K, R, D)
  float* dchannel;     // (B, K, N + 2, D): of A_log's N, dt_bias, D_skip
  float* checkpoints;  // (B, K, chunks, N, D): states that enter the chunks
};

// Shared memory: the projection of a chunk, (T, R + 2 N); going backward then raw's gradients, (T, threads + 1), and
// the sums of a warp, (warps, T, 2 N).
__host__ __device__ constexpr int general_shared_floats(int columns, int num_states, bool is_backward) {
  const int chunk = general_chunk(num_states);
  const int backward = chunk * (kGeneralThreads + 1) + kGeneralThreads / 32 * chunk * 2 * num_states;
  return chunk * columns + (is_backward ? backward : 0);
}

// N is the number of state components rounded up; those past p.states are zero throughout.
template <typename T, int N>
struct GeneralThread {
  static constexpr int kChunk = general_chunk(N);

  const GeneralInputs<T>& p;
  const GeneralOutputs& out;
  const int64_t image = blockIdx.x;
  const int d = blockIdx.y * kGeneralThreads + threadIdx.x;
  const bool exists = d < p.channels;
  const int chunks = (p.length + kChunk - 1) / kChunk;
  float* const stage = shared_memory();
  float* const draws = stage + kChunk * p.columns();
  float* const sums = draws + kChunk * (kGeneralThreads + 1);

  int k;
  bool is_reverse;
  float bias, A[N], s[kChunk], x[kChunk];

  __device__ __forceinline__ void start_direction(int direction) {
    k = direction;
    is_reverse = p.reverse >> k & 1;
    const int64_t own = static_cast<int64_t>(k) * p.channels + d;
    bias = exists ? kLog2e * p.dt_bias[own] : 0.f;
#pragma unroll
    for (int n = 0; n < N; ++n)
      A[n] = exists && n < p.states ? -expf(p.A_log[own * p.states + n]) : 0.f;
  }

  __device__ __forceinline__ int valid(int chunk) const { return min(kChunk, p.length - chunk * kChunk); }
  __device__ __forceinline__ int64_t row(int chunk) const { return image * p.length + chunk * kChunk; }
  __device__ __forceinline__ float B(int i, int n) const {
    return n < p.states ? stage[i * p.columns() + p.rank + n] : 0.f;
  }
  __device__ __forceinline__ float C(int i, int n) const {
    return n < p.states ? stage[i * p.columns() + p.rank + p.states + n] : 0.f;
  }
  __device__ __forceinline__ int64_t checkpoint(int chunk, int n) const {
    return (((image * p.directions + k) * chunks + chunk) * p.states + n) * p.channels + d;
  }

  // Stage a chunk's projection (B times ln 2, zero past the end); x and time steps to registers.
  __device__ __forceinline__ void begin(int chunk) {
    const int columns = p.columns();
    const T* from = p.projection + (row(chunk) * p.directions + k) * columns;
    __syncthreads();
    for (int item = threadIdx.x; item < kChunk * columns; item += kGeneralThreads) {
      const int i = item / columns, column = item % columns;
      const bool is_B = column >= p.rank && column < p.rank + p.states;
      const float value =
          i < valid(chunk) ? static_cast<float>(from[static_cast<int64_t>(i) * p.directions * columns + column]) : 0.f;
      stage[item] = is_B ? kLn2 * value : value;
    }
    __syncthreads();
    float raw[kChunk] = {};
    if (exists)
      for (int r = 0; r < p.rank; ++r) {
        const float weight = p.dt_weight[(static_cast<int64_t>(k) * p.rank + r) * p.channels + d];
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          raw[i] = fmaf(weight, stage[i * columns + r], raw[i]);
      }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[i] = exists && i < valid(chunk) ? static_cast<float>(p.x[(row(chunk) + i) * p.x_row + d]) : 0.f;
      s[i] = softplus2<true>(fmaf(kLog2e, raw[i], bias));
    }
  }

  // All directions, one after the other: y and, if there is a place for them, checkpoints.
  __device__ __forceinline__ void forward() {
    for (int direction = 0; direction < p.directions; ++direction) {
      start_direction(direction);
      const float skip = exists ? p.D_skip[static_cast<int64_t>(k) * p.channels + d] : 0.f;
      float state[N] = {};
      for (int n = 0; n < chunks; ++n) {
        const int chunk = is_reverse ? chunks - 1 - n : n;
        if (out.checkpoints && exists)
#pragma unroll
          for (int c = 0; c < N; ++c)
            if (c < p.states)
              out.checkpoints[checkpoint(chunk, c)] = state[c];
        begin(chunk);
        if (is_reverse)
          forward_chunk<true>(chunk, skip, state);
        else
          forward_chunk<false>(chunk, skip, state);
      }
    }
  }

  template <bool kReverse>
  __device__ __forceinline__ void forward_chunk(int chunk, float skip, float (&state)[N]) {
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = kReverse ? kChunk - 1 - step : step;
      float y = skip * x[i];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        state[n] = advanced<true>(state[n], s[i], A[n], B(i, n), x[i]);
        y = fmaf(C(i, n), state[n], y);
      }
      if (out.y && exists && i < valid(chunk)) {
        float& own = out.y[(row(chunk) + i) * p.channels + d];
        own = k == 0 ? y : own + y;
      }
    }
  }

  __device__ __forceinline__ void backward() {
    for (int direction = 0; direction < p.directions; ++direction) {
      start_direction(direction);
      const int64_t own = static_cast<int64_t>(k) * p.channels + d;
      const float skip = exists ? p.D_skip[own] : 0.f;
      float carried[N] = {}, dA_log[N] = {}, dbias = 0.f, dskip = 0.f;
      for (int n = 0; n < chunks; ++n) {
        const int chunk = is_reverse ? n : chunks - 1 - n;
        begin(chunk);
        if (is_reverse)
          backward_chunk<true>(chunk, skip, carried, dA_log, dbias, dskip);
        else
          backward_chunk<false>(chunk, skip, carried, dA_log, dbias, dskip);
        add_ddt_weight(chunk, n == 0);
        __syncthreads();
        store_dprojection(chunk);
      }
      if (!exists)
        continue;
      float* const to = out.dchannel + (image * p.directions + k) * (p.states + 2) * p.channels + d;
#pragma unroll
      for (int c = 0; c < N; ++c)
        if (c < p.states)
          to[static_cast<int64_t>(c) * p.channels] = dA_log[c] * A[c] * kLn2;
      to[static_cast<int64_t>(p.states) * p.channels] = dbias;
      to[static_cast<int64_t>(p.states + 1) * p.channels] = dskip;
    }
  }

  // Gradients of a chunk: x's and the channel's own; raw's and, summed over the warp, B's and C's to shared memory.
  template <bool kReverse>
  __device__ __forceinline__ void backward_chunk(
      int chunk, float skip, float (&carried)[N], float (&dA_log)[N], float& dbias, float& dskip) {
    float before[kChunk][N], state[N], dy[kChunk];
#pragma unroll
    for (int n = 0; n < N; ++n)
      state[n] = exists && n < p.states ? out.checkpoints[checkpoint(chunk, n)] : 0.f;
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = kReverse ? kChunk - 1 - step : step;
      dy[i] = exists && i < valid(chunk) ? out.dy[(row(chunk) + i) * p.channels + d] : 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        before[i][n] = state[n];
        state[n] = advanced<true>(state[n], s[i], A[n], B(i, n), x[i]);
        put_sum(i, N + n, dy[i] * state[n]);
      }
    }
#pragma unroll
    for (int step = 0; step < kChunk; ++step) {
      const int i = kReverse ? step : kChunk - 1 - step;
      float dx = skip * dy[i], draw = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float dstate = fmaf(C(i, n), dy[i], carried[n]);
        const StepGradient gradient =
            step_gradient<true>(dstate, before[i][n], s[i], decay_of(s[i], A[n]), A[n], B(i, n), x[i]);
        carried[n] = gradient.previous;
        dA_log[n] += gradient.A_log;
        draw += gradient.raw;
        dx += gradient.x;
        put_sum(i, n, gradient.B);
      }
      dbias += draw;
      dskip = fmaf(dy[i], x[i], dskip);
      draws[i * (kGeneralThreads + 1) + threadIdx.x] = draw;
      if (exists && i < valid(chunk)) {
        float& own = out.dx[(row(chunk) + i) * p.channels + d];
        own = k == 0 ? dx : own + dx;
      }
    }
  }

  // The warp's sum of a value, of which there are 2 N at every position.
  __device__ __forceinline__ void put_sum(int i, int column, float value) {
    for (int step = 16; step; step /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, step);
    if (threadIdx.x % 32 == 0)
      sums[(threadIdx.x / 32 * kChunk + i) * 2 * N + column] = value;
  }

  __device__ __forceinline__ void add_ddt_weight(int chunk, bool is_first) {
    if (!exists)
      return;
    for (int r = 0; r < p.rank; ++r) {
      float& own = out.ddt_weight[((image * p.directions + k) * p.rank + r) * p.channels + d];
      float total = is_first ? 0.f : own;
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        total = fmaf(draws[i * (kGeneralThreads + 1) + threadIdx.x], stage[i * p.columns() + r], total);
      own = total;
    }
  }

  __device__ __forceinline__ void store_dprojection(int chunk) {
    const int columns = p.columns();
    const int first = blockIdx.y * kGeneralThreads;
    const int count = min(kGeneralThreads, p.channels - first);
    for (int item = threadIdx.x; item < valid(chunk) * columns; item += kGeneralThreads) {
      const int i = item / columns, column = item % columns;
      float total = 0.f;
      if (column < p.rank) {
        const float* weight = p.dt_weight + (static_cast<int64_t>(k) * p.rank + column) * p.channels + first;
        for (int c = 0; c < count; ++c)
          total = fmaf(draws[i * (kGeneralThreads + 1) + c], weight[c], total);
      } else {
        const int n = (column - p.rank) % p.states;
        const int from = column - p.rank < p.states ? n : N + n;
        for (int w = 0; w < kGeneralThreads / 32; ++w)
          total += sums[(w * kChunk + i) * 2 * N + from];
      }
      const int64_t to = (static_cast<int64_t>(blockIdx.y) * p.batch * p.length + row(chunk) + i) * p.directions + k;
      out.dprojection[to * columns + column] = total;
    }
  }
};

// Grid (B, blocks of channels).
template <typename T, int N>
__global__ void __launch_bounds__(kGeneralThreads) general_kernel(const GeneralInputs<T> p, const GeneralOutputs out) {
  GeneralThread<T, N>{p, out}.forward();
}

template <typename T, int N>
__global__ void __launch_bounds__(kGeneralThreads)
    general_backward_kernel(const GeneralInputs<T> p, const GeneralOutputs out) {
  GeneralThread<T, N>{p, out}.backward();
}

}  // namespace mobilemamba
