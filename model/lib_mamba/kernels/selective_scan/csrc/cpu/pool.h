// The threads of the CPU kernels: PyTorch's, or for a folded network, which needs nothing of PyTorch's, our own.
//
// PyTorch's are OpenMP's. A parallel region ends when every thread has taken its part. On a busy machine one of them
// waits for a core, and meanwhile the others spin and keep it from getting one. A region of our own never waits for a
// thread that has not begun: whoever is there does the work, and threads that have nothing to do soon sleep. Training
// runs on them too, between operators of PyTorch's, such as the optimiser's: there PyTorch's are made to sleep as well.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

namespace mobilemamba {

// As many as PyTorch has (torch.set_num_threads, OMP_NUM_THREADS); 1 within a parallel region.
int64_t num_threads();

// While it lives, the parallel regions that this thread begins run on our own threads.
class OwnThreads {
 public:
  OwnThreads();
  ~OwnThreads();
  OwnThreads(const OwnThreads&) = delete;
  OwnThreads& operator=(const OwnThreads&) = delete;

 private:
  const bool before_;
};

// An operator that runs on them: OnOwnThreads<function>::call.
template <auto function>
struct OnOwnThreads;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct OnOwnThreads<function> {
  static Result call(Arguments... arguments) {
    const OwnThreads threads;
    return function(std::forward<Arguments>(arguments)...);
  }
};

// Makes PyTorch's threads sleep soon where they wait, from now on, unless the environment says how they wait
// (OMP_WAIT_POLICY, GOMP_SPINCOUNT). GNU's OpenMP reads that when it is loaded; but it hardly lets threads spin while
// it has more of them than there are cores, so we let it have a second team, which sleeps.
void let_pytorch_sleep();

// An operator of training: on our own threads, beside PyTorch's.
template <auto function>
struct BesidePyTorch;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct BesidePyTorch<function> {
  static Result call(Arguments... arguments) {
    let_pytorch_sleep();
    return OnOwnThreads<function>::call(std::forward<Arguments>(arguments)...);
  }
};

// Calls `body(t)` on the calling thread, t = 0, and beside it on up to `count` - 1 others, t = 1, 2, ...: of our own,
// those that come before the calling one has returned from its call. So body(0) alone must see to all the work. Returns
// when all calls have; if some throw, throws what one of them did.
void run_beside(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace mobilemamba
