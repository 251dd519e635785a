// The mathematics of one step of the scan, for one channel and one state component.
//
// Time steps are in units of ln 2: with w = log2(e) * (dt_weight . dt + dt_bias), s = log2(1 + 2^w), delta = s * ln 2
// and the decay is 2^(s * A), A = -exp(A_log). Three special functions then make a step. B comes multiplied by ln 2.
// kExact is for float32: nothing is lost. Otherwise a few bits of float32 are lost, far fewer than 16-bit inputs lack.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "scan/cuda/device.cuh"

namespace mobilemamba {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// log2(1 + u) / u for u in [0, 1], to a relative 4e-4, and to 6e-5.
__device__ __forceinline__ float log2_ratio_short(float u) {
  return fmaf(u, fmaf(u, fmaf(u, -0.10725442f, 0.36648067f), -0.70174733f), 1.4421281f);
}
__device__ __forceinline__ float log2_ratio(float u) {
  return fmaf(u, fmaf(u, fmaf(u, fmaf(u, 0.05965155f, -0.22711949f), 0.44189889f), -0.71698744f), 1.4426132f);
}

// log2(1 + 2^w) for numbers of type T: relatively accurate for any w, infinite and NaN where w is.
template <typename T>
__device__ __forceinline__ float softplus2_of(float w) {
  if constexpr (std::is_same_v<T, float>)
    return w > 24.f ? w : kLog2e * log1pf(fast_exp2(w));
  const float u = fast_exp2_down(w);
  const float ratio = std::is_same_v<T, c10::BFloat16> ? log2_ratio_short(u) : log2_ratio(u);
  return fmaf(u, ratio, fmaxf(w, 0.f));
}

// The same, exact or good enough for any 16-bit type.
template <bool kExact>
__device__ __forceinline__ float softplus2(float w) {
  return softplus2_of<std::conditional_t<kExact, float, c10::Half>>(w);
}

// Derivative of the softplus, 1 - 2^-s, relatively accurate for any s; times a factor.
template <bool kExact>
__device__ __forceinline__ float softplus2_slope(float s, float factor = 1.f) {
  if constexpr (kExact)
    return -expm1f(-s * kLn2) * factor;
  // The difference is too large by more than it errs; where that matters, s ln 2 is smaller, and nearly the same.
  constexpr float kAboveOne = 1.f + 0x1p-22f;
  return fminf(s * (kLn2 * factor), fmaf(-factor, fast_exp2_down(s), kAboveOne * factor));
}

__device__ __forceinline__ float decay_of(float s, float A) {
  return fast_exp2(s * A);
}

__device__ __forceinline__ float next_state(float state, float s, float decay, float B, float x) {
  return fmaf(decay, state, s * B * x);
}

// value * 2^(s * A). Exactly, what is lost is a factor of its own: a decay near 1 is not rounded as such, which would
// add up over thousands of steps.
template <bool kExact>
__device__ __forceinline__ float decayed(float value, float s, float A) {
  if (kExact)
    return fmaf(expm1f(kLn2 * (s * A)), value, value);
  return decay_of(s, A) * value;
}

template <bool kExact>
__device__ __forceinline__ float advanced(float state, float s, float A, float B, float x) {
  if (kExact)
    return state + fmaf(expm1f(kLn2 * (s * A)), state, s * B * x);
  return next_state(state, s, decay_of(s, A), B, x);
}

__device__ __forceinline__ float sigmoid(float value) {
  return fast_reciprocal(1.f + fast_exp2(-kLog2e * value));
}

// The gradients of one step, given the gradient of its state and of its output y = C * state.
struct StepGradient {
  float x;         // without the skip term
  float B;         // of B itself
  float raw;       // of dt_weight . dt + dt_bias
  float A_log;     // to be multiplied by A * ln 2 after summing
  float previous;  // of the state before
};

template <bool kExact>
__device__ __forceinline__ StepGradient
step_gradient(float dstate, float previous, float s, float decay, float A, float B, float x) {
  StepGradient gradient;
  const float sB = s * B;
  const float ddecay = dstate * previous * decay;  // times the decay: of its logarithm
  gradient.x = dstate * sB;
  gradient.B = dstate * x * s * kLn2;
  gradient.raw = fmaf(dstate * x, B * kLog2e, ddecay * A) * softplus2_slope<kExact>(s);
  gradient.A_log = ddecay * s;
  gradient.previous = decay * dstate;
  return gradient;
}

// Gradients of out = normed * z * sigmoid(z). For bfloat16 roughly: by the tangent, one special function where the
// sigmoid takes two.
struct GateGradient {
  float gate;    // of z
  float normed;  // of the normalised value, scaled and shifted
};

template <bool kRough = false>
__device__ __forceinline__ GateGradient gate_gradient(float grad, float z, float normed) {
  const float opening = kRough ? fmaf(0.5f, fast_tanh(0.5f * z), 0.5f) : sigmoid(z), opened = z * opening;
  return {grad * normed * (opening + fmaf(-opened, opening, opened)), grad * opened};
}

}  // namespace mobilemamba
