// How a sequence is divided into chunks. The forward pass keeps the states that enter them for the backward pass.
#pragma once

#include <cuda_runtime.h>

namespace mobilemamba {

constexpr int kMaxChunk = 16;
constexpr int kPartialChunk = 13;  // the only length of which a sequence may end with a part

__host__ __device__ constexpr bool is_chunk_length(int positions) {
  return positions == 9 || (12 <= positions && positions <= 14) || positions == 16;
}

// Positions of a chunk: of the lengths that kernels are made for, the one that pads a sequence least.
__host__ __device__ constexpr int chunk_length(int length) {
  int best = kMaxChunk;
  for (int c = kMaxChunk; c > 0; --c)
    if (is_chunk_length(c) && (length + c - 1) / c * c < (length + best - 1) / best * best)
      best = c;
  return best;
}

// Kept states of a direction, one a chunk: none of a sequence that is a chunk.
__host__ __device__ constexpr int num_states(int length) {
  return length > kMaxChunk ? (length + chunk_length(length) - 1) / chunk_length(length) : 0;
}

static_assert(chunk_length(9) == 9 && chunk_length(36) == 12 && chunk_length(49) == 13 && chunk_length(196) == 14);
static_assert(chunk_length(16) == 16 && chunk_length(144) == 16 && num_states(16) == 0 && num_states(65) == 5);

}  // namespace mobilemamba
