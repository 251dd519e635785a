// csrc/scan/cuda/device.cuh, whose instructions a CPU does not have; included ahead of it, under its include guard.
#ifndef MOBILEMAMBA_DEVICE_CUH
#define MOBILEMAMBA_DEVICE_CUH

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

namespace mobilemamba {

// The approximations are good to about 2 units in the last place, and may err to the same side every time, as these do;
// numbers below the normal ones are zero.
inline float flush(float value) {
  return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.f, value) : value;
}
inline float fast_exp2(float value) {
  return flush(std::exp2(flush(value)) * (1.f - 0x1p-23f));
}
inline float fast_exp2_down(float value) {
  return fast_exp2(-std::fabs(value));
}
inline float fast_tanh(float value) {
  return std::tanh(value) * (1.f - 0x1p-12f);
}
inline float fast_reciprocal(float value) {
  return flush(1.f / flush(value));
}

// To the nearest number with 10 fraction bits, ties away from zero.
inline float round_tf32(float value) {
  if (!std::isfinite(value))
    return value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x1000u) & 0xffffe000u;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

inline uint32_t pack_bfloat16(float low, float high) {
  return c10::BFloat16(low).x | static_cast<uint32_t>(c10::BFloat16(high).x) << 16;
}
inline uint32_t multiply_add_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  const auto value = [](uint32_t bits) -> float {
    return c10::BFloat16(static_cast<uint16_t>(bits), c10::BFloat16::from_bits());
  };
  return pack_bfloat16(
      std::fma(value(a), value(b), value(c)), std::fma(value(a >> 16), value(b >> 16), value(c >> 16)));
}
inline uint32_t pack_half(float low, float high) {
  return c10::Half(low).x | static_cast<uint32_t>(c10::Half(high).x) << 16;
}

inline void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  cuda_on_cpu::multiply_tf32(c, a, b);
}

// Of pairs, the first ones and the second ones are a product of their own each.
template <typename T>
void add_products_of_pairs(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (int place = 0; place < 2; ++place) {
    const auto value = [&](uint32_t pair) -> float {
      return T(static_cast<uint16_t>(pair >> 16 * place), T::from_bits());
    };
    multiply_tf32(c, {value(a[0]), value(a[1]), value(a[2]), value(a[3])}, {value(b0), value(b1)});
  }
}
inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  add_products_of_pairs<c10::BFloat16>(c, a, b0, b1);
}
inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  add_products_of_pairs<c10::Half>(c, a, b0, b1);
}

template <typename Word>
void load_fragment(Word (&a)[4], const Word* matrix, int row, int rows = 16) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    a[i] = matrix[std::min(g + i % 2 * 8, rows - 1) * row + q + i / 2 * 4];
}
inline void load_paired_fragment(float (&a)[4], const float* matrix, int row) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    a[i] = matrix[(2 * g + i % 2) * row + q + i / 2 * 4];
}
inline void load_halves_fragment(float (&a)[4], const float* matrix, int row, int distance) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    a[i] = matrix[g * row + i % 2 * distance + q + i / 2 * 4];
}
inline void load_transposed_fragment(uint32_t (&a)[4], const uint32_t* matrix, int row) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const uint16_t* const values = reinterpret_cast<const uint16_t*>(matrix);
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const own = values + 2 * (2 * q + i / 2 * 8) * row + g + i % 2 * 8;
    a[i] = own[0] | static_cast<uint32_t>(own[2 * row]) << 16;
  }
}

inline void end_basic_block(bool never) {
  if (never)
    std::abort();
}
inline int thread_index_again() {
  return threadIdx.x;
}
inline int warp_index() {
  return threadIdx.x / 32;
}

inline uint32_t load_word(const void* from) {
  cuda_on_cpu::count_load(from);
  return *static_cast<const uint32_t*>(from);
}
template <typename Value>
Value load_value(const Value* from) {
  static_assert(sizeof(Value) % sizeof(uint32_t) == 0);
  for (size_t i = 0; i < sizeof(Value) / sizeof(uint32_t); ++i)
    cuda_on_cpu::count_load(reinterpret_cast<const uint32_t*>(from) + i);
  return *from;
}
inline float4 load_written(const float4* from) {
  return load_value(from);
}
template <typename Value>
void store_value(Value* to, Value value) {
  cuda_on_cpu::count_store(sizeof(Value));
  *to = value;
}
inline void store_word(void* to, uint32_t word) {
  cuda_on_cpu::count_store(sizeof word);
  *static_cast<uint32_t*>(to) = word;
}

inline void copy_ahead(float4* to, const void* from, bool is_there) {
  cuda_on_cpu::copy_ahead(to, is_there ? from : nullptr);
}
inline void wait_for_copies() {
  cuda_on_cpu::wait_for_copies();
}

inline void cluster_arrive() {
  cuda_on_cpu::cluster_arrive();
}
inline void cluster_arrive_from_reading() {
  cuda_on_cpu::cluster_arrive();
}
inline void cluster_wait() {
  cuda_on_cpu::cluster_wait();
}
inline float4 read_of_block(const float4* own, int rank) {
  const auto offset = reinterpret_cast<const float*>(own) - cuda_on_cpu::shared_memory();
  return *reinterpret_cast<const float4*>(cuda_on_cpu::shared_memory_of(rank) + offset);
}

inline float* shared_memory() {
  return cuda_on_cpu::shared_memory();
}

}  // namespace mobilemamba

#endif
