// Work shared by threads, and sums over images in an order that does not depend on their number.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pool.h"

namespace mobilemamba {

// `total` things in pieces of nearly the same size.
struct Pieces {
  int64_t total, count;

  // Of about `size`; as many for each thread where they are few.
  static Pieces for_threads(int64_t total, int64_t size) {
    const int64_t threads = num_threads(), count = ceil_div(total, size);
    return {total, count < 4 * threads ? std::min(total, round_up(count, threads)) : count};
  }

  // More than `least` where there are enough things, for any number of threads alike: a multiple of 16, which most
  // numbers of threads divide.
  static Pieces for_any_threads(int64_t total, int64_t least) {
    return {total, std::max<int64_t>(1, std::min(total, (least / 16 + 1) * 16))};
  }

  int64_t begin(int64_t i) const { return i * total / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t largest() const { return count ? ceil_div(total, count) : 0; }
};

// `total` things in strips of one size, but for the last.
struct Strips {
  int64_t total, size;

  int64_t count() const { return ceil_div(total, size); }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t end(int64_t i) const { return std::min(begin(i) + size, total); }
};

enum Order { kForwards, kBackwards };

// Calls `start()` on every thread, and the function that it returns once for every i in [0, count). Each thread has its
// own run, whose neighbours it finds in its cache. When it is done, it takes pieces that the others have not begun: one
// core is often faster than another, or has other work.
template <class Start>
void share_started(int64_t count, Order order, Start start) {
  struct alignas(64) Run {
    int64_t begin, end;
    std::atomic<int64_t> taken{0};
  };
  const int64_t threads = std::min(num_threads(), count);
  std::vector<Run> runs(threads);
  for (int64_t t = 0; t < threads; ++t)
    runs[t].begin = t * count / threads, runs[t].end = (t + 1) * count / threads;
  run_beside(threads, [&](int64_t t) {
    const auto body = start();
    for (int64_t other = 0; other < threads; ++other) {
      Run& run = runs[(t + other) % threads];
      const int64_t size = run.end - run.begin;
      for (int64_t i; (i = run.taken.fetch_add(1, std::memory_order_relaxed)) < size;)
        body(order == kForwards ? run.begin + i : run.end - 1 - i);
    }
  });
}

template <class Body>
void share(int64_t count, Order order, const Body& body) {
  share_started(count, order, [&]() -> const Body& { return body; });
}

// Calls `body(i, scratch)`, every thread with its own `size` floats.
template <class Body>
void share_with_scratch(int64_t count, int64_t size, const Body& body) {
  share_started(count, kForwards, [&] {
    return [&body, scratch = floats(size)](int64_t i) { body(i, scratch.mutable_data_ptr<float>()); };
  });
}

// Calls `body(begin, end)` for pieces of [0, total) of about `size`.
template <class Body>
void share_range(int64_t total, int64_t size, const Body& body) {
  const Pieces pieces = Pieces::for_threads(total, size);
  share(pieces.count, kForwards, [&](int64_t i) { body(pieces.begin(i), pieces.begin(i + 1)); });
}

inline void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    to[i] += from[i];
}

// Partial sums (groups, size) of groups of images, made by `body(first image, last image, unit, partial sum, scratch)`,
// added up in an order that does not depend on the number of threads.
template <class Body>
void sum_images(int64_t images, int64_t units, int64_t size, float* total, int64_t scratch_size, Body body) {
  constexpr int64_t kGroups = 16, kShares = 64;  // at most: only so many as give threads enough to do
  const int64_t groups = std::min({images, kGroups, ceil_div(kShares, units)});
  const at::Tensor partial = floats(groups * size);
  float* sums = partial.mutable_data_ptr<float>();
  share_range(groups * size, 1 << 16, [&](int64_t begin, int64_t end) { std::fill(sums + begin, sums + end, 0.f); });
  share_with_scratch(groups * units, scratch_size, [&](int64_t i, float* scratch) {
    const int64_t group = i / units;
    body(group * images / groups, (group + 1) * images / groups, i % units, sums + group * size, scratch);
  });
  share_range(size, 1 << 12, [&](int64_t begin, int64_t end) {
    std::fill(total + begin, total + end, 0.f);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = begin; i < end; ++i)
        total[i] += sums[group * size + i];
  });
}

}  // namespace mobilemamba
