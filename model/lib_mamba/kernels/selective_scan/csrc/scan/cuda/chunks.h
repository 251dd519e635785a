// How a sequence is divided into chunks, and which states the forward pass keeps for the backward pass.
#pragma once

#include <cuda_runtime.h>

namespace mobilemamba {

constexpr int kMaxChunk = 16;
constexpr int kPartialChunk = 13;  // the only length of which a sequence may end with a part
constexpr int kChunksAState = 4;
constexpr int kMaxLengthWithoutStates = 64;  // sequences up to here are scanned again from their ends

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

// Positions between two kept states of a direction.
__host__ __device__ constexpr int state_interval(int length) {
  return kChunksAState * chunk_length(length);
}

__host__ __device__ constexpr int num_states(int length) {
  return length > kMaxLengthWithoutStates ? (length + state_interval(length) - 1) / state_interval(length) : 0;
}

static_assert(chunk_length(9) == 9 && chunk_length(36) == 12 && chunk_length(49) == 13 && chunk_length(196) == 14);
static_assert(chunk_length(16) == 16 && chunk_length(144) == 16 && num_states(64) == 0 && num_states(65) == 2);

}  // namespace mobilemamba
