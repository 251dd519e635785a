// How the stand-in for a GPU can be set.
#pragma once

namespace cuda_on_cpu {

// In which order the threads of a block run up to the next barrier, and blocks.
enum Order { kAscending, kDescending, kShuffled };

void set_order(int order);
void set_device(int multiprocessors, int shared_bytes);

}  // namespace cuda_on_cpu
