// Settings of the stand-in for a GPU.
#pragma once

#include <cstdint>
#include <utility>

namespace cuda_on_cpu {

// The order in which blocks run, and within a block the threads up to the next barrier.
enum Order { kAscending, kDescending, kShuffled };

void set_order(int order);
void set_device(int multiprocessors, int shared_bytes, int most_cluster_blocks);

// Bytes loaded and stored by words since the last call.
std::pair<int64_t, int64_t> take_traffic();

}  // namespace cuda_on_cpu
