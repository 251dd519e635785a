// Settings of the stand-in for a GPU.
#pragma once

namespace cuda_on_cpu {

// The order in which blocks run, and within a block the threads up to the next barrier.
enum Order { kAscending, kDescending, kShuffled };

void set_order(int order);
void set_device(int multiprocessors, int shared_bytes);

}  // namespace cuda_on_cpu
