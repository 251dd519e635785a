#include "cpu/pool.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <list>
#include <mutex>
#include <thread>

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace mobilemamba {
namespace {

thread_local bool is_in_region = false, has_own_threads = false;

// How long a thread spins before it sleeps: between the operators of a network, Python takes tens of microseconds,
// about as long as to wake a thread.
constexpr std::chrono::microseconds kShortest{1}, kLongest{100};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins while `is_waiting()`, up to a time that doubles where this was enough and halves where it was not: on a busy
// machine threads hardly spin.
class Spinner {
 public:
  template <class Condition>
  bool wait_while(const Condition& is_waiting) {
    const auto start = std::chrono::steady_clock::now();
    while (is_waiting()) {
      for (int i = 0; i < 16; ++i)
        pause();
      if (std::chrono::steady_clock::now() - start >= limit_) {
        limit_ = std::max(limit_ / 2, std::chrono::nanoseconds(kShortest));
        return false;
      }
    }
    limit_ = std::min(limit_ * 2, std::chrono::nanoseconds(kLongest));
    return true;
  }

 private:
  std::chrono::nanoseconds limit_ = kLongest;
};

struct Region {
  const std::function<void(int64_t)>& body;
  const int64_t count;
  int64_t next = 1;                 // the first t that no thread has
  std::atomic<int64_t> running{0};  // threads beside the calling one
  std::exception_ptr error = nullptr;
};

class Pool {
 public:
  void run(int64_t count, const std::function<void(int64_t)>& body) {
    Region region{body, count};
    begin(region);
    call(region, 0);
    end(region);
    if (region.error)
      std::rethrow_exception(region.error);
  }

 private:
  void begin(Region& region) {
    const std::lock_guard<std::mutex> lock(mutex_);
    num_wanted_ += region.count - 1;
    for (; num_workers_ < num_wanted_; ++num_workers_)
      std::thread([this] { work(); }).detach();
    regions_.push_back(&region);
    num_begun_.fetch_add(1, std::memory_order_release);
    for (int64_t i = std::min(num_asleep_, region.count - 1); i > 0; --i)
      has_work_.notify_one();
  }

  // No thread comes any more; waits for those that came.
  void end(Region& region) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      regions_.remove(&region);
      num_wanted_ -= region.count - 1;
    }
    const auto is_running = [&] { return region.running.load(std::memory_order_acquire) > 0; };
    static thread_local Spinner spinner;
    if (!is_running() || spinner.wait_while(is_running))
      return;
    std::unique_lock<std::mutex> lock(mutex_);
    has_ended_.wait(lock, [&] { return !is_running(); });
  }

  void call(Region& region, int64_t t) {
    is_in_region = true;
    try {
      region.body(t);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      region.error = std::current_exception();
    }
    is_in_region = false;
  }

  // A worker's life: it ends with the process.
  [[noreturn]] void work() {
    Spinner spinner;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      if (regions_.empty()) {
        const int64_t seen = num_begun_.load(std::memory_order_acquire);
        lock.unlock();
        spinner.wait_while([&] { return num_begun_.load(std::memory_order_acquire) == seen; });
        lock.lock();
        ++num_asleep_;
        has_work_.wait(lock, [&] { return !regions_.empty(); });
        --num_asleep_;
      }
      Region& region = *regions_.front();
      const int64_t t = region.next++;
      if (region.next == region.count)
        regions_.pop_front();
      region.running.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      call(region, t);
      lock.lock();
      if (region.running.fetch_sub(1, std::memory_order_acq_rel) == 1)
        has_ended_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable has_work_, has_ended_;
  std::list<Region*> regions_;  // that more threads may join, the oldest first
  std::atomic<int64_t> num_begun_{0};
  int64_t num_workers_ = 0, num_wanted_ = 0, num_asleep_ = 0;
};

// Never destroyed: its threads run until the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  if (Pool* found = the_pool.load(std::memory_order_acquire))
    return *found;
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool = new Pool;
#if defined(__linux__) || defined(__APPLE__)
    // A forked process (a data worker) has none of the threads, and perhaps a locked mutex: it begins anew.
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
#endif
  });
  return *the_pool;
}

}  // namespace

int64_t num_threads() {
  return is_in_region || at::in_parallel_region() ? 1 : at::get_num_threads();
}

OwnThreads::OwnThreads() : before_(std::exchange(has_own_threads, true)) {
}

OwnThreads::~OwnThreads() {
  has_own_threads = before_;
}

void let_pytorch_sleep() {
  static std::once_flag once;
  if (num_threads() == 1 || std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT"))
    return;
  std::call_once(once, [] {
    std::thread([] {
      constexpr int64_t kEnough = 1 << 20;  // for PyTorch to share it among threads, which stay with the one that asks
      at::zeros({kEnough}, at::TensorOptions(at::kFloat)).add_(1);
      while (true)
        std::this_thread::sleep_for(std::chrono::hours(1));
    }).detach();
  });
}

void run_beside(int64_t count, const std::function<void(int64_t)>& body) {
  if (count <= 1 || num_threads() == 1) {
    body(0);
  } else if (has_own_threads) {
    pool().run(count, body);
  } else {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        body(t);
    });
  }
}

}  // namespace mobilemamba
