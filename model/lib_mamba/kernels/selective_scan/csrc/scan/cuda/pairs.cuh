// Two neighbouring channels: as they lie in memory, and as floats.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "scan/cuda/step.cuh"

namespace mobilemamba {

// Two values of T, aligned to both.
template <typename T>
struct Pair {
  uint32_t bits;
};
template <>
struct Pair<float> {
  float2 values;
};

__device__ __forceinline__ float2 unpack(const Pair<float>& pair) {
  return pair.values;
}
__device__ __forceinline__ float2 unpack(const Pair<c10::BFloat16>& pair) {
  return make_float2(__uint_as_float(pair.bits << 16), __uint_as_float(pair.bits & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack(const Pair<c10::Half>& pair) {
  const c10::Half low(static_cast<uint16_t>(pair.bits), c10::Half::from_bits());
  const c10::Half high(static_cast<uint16_t>(pair.bits >> 16), c10::Half::from_bits());
  return make_float2(static_cast<float>(low), static_cast<float>(high));
}

template <typename T>
__device__ __forceinline__ Pair<T> pack(float2 values);
template <>
__device__ __forceinline__ Pair<float> pack(float2 values) {
  return {values};
}
template <>
__device__ __forceinline__ Pair<c10::BFloat16> pack(float2 values) {
  return {pack_bfloat16(values.x, values.y)};
}
template <>
__device__ __forceinline__ Pair<c10::Half> pack(float2 values) {
  return {pack_half(values.x, values.y)};
}

template <typename T>
__device__ __forceinline__ const Pair<T>* as_pairs(const T* from) {
  return reinterpret_cast<const Pair<T>*>(from);
}
template <typename T>
__device__ __forceinline__ Pair<T>* as_pairs(T* to) {
  return reinterpret_cast<Pair<T>*>(to);
}

__device__ __forceinline__ float2 operator+(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
__device__ __forceinline__ float2 operator*(float2 a, float2 b) {
  return make_float2(a.x * b.x, a.y * b.y);
}
__device__ __forceinline__ float2 operator*(float2 a, float b) {
  return make_float2(a.x * b, a.y * b);
}
__device__ __forceinline__ float2 multiply_add(float2 a, float2 b, float2 c) {
  return make_float2(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y));
}
__device__ __forceinline__ float2 multiply_add(float2 a, float b, float2 c) {
  return make_float2(fmaf(a.x, b, c.x), fmaf(a.y, b, c.y));
}
__device__ __forceinline__ Pair<c10::BFloat16> multiply_add(
    Pair<c10::BFloat16> a, Pair<c10::BFloat16> b, Pair<c10::BFloat16> c) {
  return {multiply_add_bfloat16(a.bits, b.bits, c.bits)};
}
__device__ __forceinline__ Pair<c10::BFloat16> operator*(Pair<c10::BFloat16> a, Pair<c10::BFloat16> b) {
  constexpr uint32_t kMinusZeros = 0x80008000u;  // which change nothing, a zero's sign included
  return multiply_add(a, b, {kMinusZeros});
}

// z * sigmoid(z). For bfloat16 by the tangent, one special function where the sigmoid takes two: its error, 5e-4 of the
// gate at most where the gate is nearly shut, is more than float16 rounds.
template <typename T>
__device__ __forceinline__ float2 silu(const Pair<T>& z) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    constexpr uint32_t kHalves = 0x3f003f00u;
    const float2 half = unpack(z * Pair<T>{kHalves});
    return make_float2(fmaf(half.x, fast_tanh(half.x), half.x), fmaf(half.y, fast_tanh(half.y), half.y));
  }
  const float2 values = unpack(z);
  return make_float2(values.x * sigmoid(values.x), values.y * sigmoid(values.y));
}

}  // namespace mobilemamba
