// Single instructions of the GPU, and the shared memory of a block.
#ifndef MOBILEMAMBA_DEVICE_CUH
#define MOBILEMAMBA_DEVICE_CUH

#include <cuda_runtime.h>

#include <cstdint>

namespace mobilemamba {

__device__ __forceinline__ float fast_exp2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// 2^-|value|, for which the instruction itself takes the sign.
__device__ __forceinline__ float fast_exp2_down(float value) {
  float result;
  asm("{ .reg .f32 down; abs.f32 down, %1; neg.f32 down, down; ex2.approx.ftz.f32 %0, down; }"
      : "=f"(result)
      : "f"(value));
  return result;
}

__device__ __forceinline__ float fast_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// Within 2^-11 of the value.
__device__ __forceinline__ float fast_tanh(float value) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// To the nearest number with the 10 fraction bits that the tensor cores take.
__device__ __forceinline__ float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// The nearest 16-bit numbers, the first one in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// a b + c for pairs of them.
__device__ __forceinline__ uint32_t multiply_add_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// c += a b for a (16, 8), b (8, 8), c (16, 8), spread over a warp. Lane l = 4 g + q holds a[g][q], a[g + 8][q],
// a[g][q + 4], a[g + 8][q + 4]; b[q][g], b[q + 4][g]; c[g][2q], c[g][2q + 1], c[g + 8][2q], c[g + 8][2q + 1]. Volatile,
// so that it is not moved to where only some of the lanes need it. Sums that are zero need no registers: they are
// operands of their own.
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  float sums[4];
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  for (int i = 0; i < 4; ++i)
    c[i] = sums[i];
}

// Four parts of 8 rows and 16 bytes of shared memory, the rows of the i-th given by lanes 8 i to 8 i + 7; lane 4 g + q
// receives the q-th word of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The fragment a of multiply_tf32 from a (16, 8) part of a matrix in shared memory, whose rows lie `row` floats apart,
// at multiples of 16 bytes.
__device__ __forceinline__ void load_fragment(float (&a)[4], const float* matrix, int row) {
  const int lane = threadIdx.x % 32;
  uint32_t bits[4];
  load_matrices(bits, matrix + lane % 16 * row + lane / 16 * 4);
  for (int i = 0; i < 4; ++i)
    a[i] = __uint_as_float(bits[i]);
}

// The same where rows of the fragment are alternate rows of the matrix: its rows g and g + 8 are 2g and 2g + 1.
__device__ __forceinline__ void load_paired_fragment(float (&a)[4], const float* matrix, int row) {
  const int lane = threadIdx.x % 32;
  uint32_t bits[4];
  load_matrices(bits, matrix + (lane % 8 * 2 + lane / 8 % 2) * row + lane / 16 * 4);
  for (int i = 0; i < 4; ++i)
    a[i] = __uint_as_float(bits[i]);
}

// The same where the fragment's rows g + 8 are what lies `distance` floats behind its rows g.
__device__ __forceinline__ void load_halves_fragment(float (&a)[4], const float* matrix, int row, int distance) {
  const int lane = threadIdx.x % 32;
  uint32_t bits[4];
  load_matrices(bits, matrix + lane % 8 * row + lane / 8 % 2 * distance + lane / 16 * 4);
  for (int i = 0; i < 4; ++i)
    a[i] = __uint_as_float(bits[i]);
}

// c += a b for a (16, 16), b (16, 8), c (16, 8) as above, a and b in pairs of 16-bit values: a[g][2q], a[g + 8][2q],
// a[g][2q + 8], a[g + 8][2q + 8]; b[2q][g], b[2q + 8][g]; each with the one that follows in its row of a, or column of
// b.
__device__ __forceinline__ void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Its fragment a from a (16, 16) part of a matrix of pairs in shared memory, whose rows lie `row` pairs apart. Only so
// many rows are read, the last one also in place of the others.
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], const uint32_t* matrix, int row, int rows) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, matrix + min(lane % 16, rows - 1) * row + lane / 16 * 4);
}

// The same from the transpose of such a part.
__device__ __forceinline__ void load_transposed_fragment(uint32_t (&a)[4], const uint32_t* matrix, int row) {
  const int lane = threadIdx.x % 32;
  const uint32_t* const own = matrix + (lane / 16 * 8 + lane % 8) * row + lane / 8 % 2 * 4;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own)))
               : "memory");
}

// A branch that must never be taken. ptxas does not move instructions across; it would put sums off till the end, and
// hold all that goes into them in registers.
__device__ __forceinline__ void end_basic_block(bool never) {
  if (never)
    __trap();
}

// The thread's place in its block: read again, so that nothing that follows from it is held in registers till then.
__device__ __forceinline__ int thread_index_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The thread's warp, in a register that the warp shares.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}

// Global memory that a kernel only reads, four bytes at a time; loads may move ahead of barriers.
__device__ __forceinline__ uint32_t load_word(const void* from) {
  return __ldg(static_cast<const uint32_t*>(from));
}

// Global memory, where the code says.
template <typename Value>
__device__ __forceinline__ Value load_value(const Value* from) {
  return *from;
}

// What other blocks of threads have written: from the cache that all share.
__device__ __forceinline__ float4 load_written(const float4* from) {
  return __ldcg(from);
}

__device__ __forceinline__ void store_word(void* to, uint32_t word) {
  *static_cast<uint32_t*>(to) = word;
}

template <typename Value>
__device__ __forceinline__ void store_value(Value* to, Value value) {
  *to = value;
}

// 16 bytes from global to shared memory, or zeros where `is_there` is false; they have arrived after wait_for_copies,
// and for other threads after a barrier that follows it.
__device__ __forceinline__ void copy_ahead(float4* to, const void* from, bool is_there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(is_there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ __align__(16) float mobilemamba_shared[];
  return mobilemamba_shared;
}

// Barrier of all threads of a cluster, in two parts: what was written before arriving can be read after waiting.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same after reading only: nothing is made visible.
__device__ __forceinline__ void cluster_arrive_from_reading() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What another block of the cluster has at the place of `own` in its shared memory.
__device__ __forceinline__ float4 read_of_block(const float4* own, int rank) {
  float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(there)
               : "memory");
#endif
  return value;
}

}  // namespace mobilemamba

#endif
