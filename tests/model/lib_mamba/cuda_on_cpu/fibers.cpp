// Blocks one after the other, and within a block the threads as fibers: each runs until it has to wait for others.
//
// Between two barriers each thread runs ahead of the next ones, in an order that can be chosen. A value that another
// thread has not yet written, or has yet to read, is then wrong every time, on a GPU only rarely: results that differ
// between two orders mean a missing barrier. Barriers that not all threads reach are found too, and reads of shared
// memory that was not written or not requested.
#include <c10/util/Exception.h>
#include <setjmp.h>
#include <ucontext.h>

#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kCanaries = 4096;  // floats behind the shared memory
constexpr size_t kPlainSharedBytes = 48 * 1024;
const float kPoison = std::numeric_limits<float>::quiet_NaN();

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;

  void release_if_complete() {
    if (arrived && arrived == expected) {
      arrived = 0;
      ++generation;
    }
  }
};

// Values that the lanes of a warp exchange; two places in turn, so that one barrier an exchange is enough.
struct Exchange {
  const char* operation;
  float values[6];
};

struct Warp {
  Barrier barrier;
  Exchange places[2][kLanes];
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  jmp_buf where;
  bool is_started = false, is_done = true;
  const Barrier* waits_for = nullptr;
  int generation = 0, exchanges = 0;
};

std::vector<Fiber> fibers(1024);
std::vector<Warp> warps(1024 / kLanes);
Barrier block;
Fiber* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* job = nullptr;
std::vector<float> shared;
size_t shared_offset = 0;
std::map<const void*, size_t> allowed_shared;
int num_multiprocessors = 132, most_shared = 227 * 1024;
int chosen_order = kAscending;

Warp& own_warp() {
  return warps[threadIdx.x / kLanes];
}

void yield() {
  if (!_setjmp(running->where))
    _longjmp(scheduler, 1);
}

void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_complete();
  if (barrier.generation != generation)
    return;
  running->waits_for = &barrier;
  running->generation = generation;
  yield();
}

// The endless loop of a fiber: the work of a thread, whenever it is given one.
void fiber_main() {
  for (;;) {
    (*job)();
    running->is_done = true;
    for (Barrier* barrier : {&block, &own_warp().barrier}) {
      --barrier->expected;
      barrier->release_if_complete();
    }
    yield();
  }
}

// Run a thread until it waits or ends.
void resume(Fiber& fiber, int index) {
  running = &fiber;
  threadIdx = dim3(index, 0, 0);
  fiber.waits_for = nullptr;
  if (_setjmp(scheduler))
    return;
  if (fiber.is_started)
    _longjmp(fiber.where, 1);
  fiber.is_started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

bool is_ready(const Fiber& fiber) {
  return !fiber.is_done && (!fiber.waits_for || fiber.waits_for->generation != fiber.generation);
}

std::vector<int> thread_order(int threads, std::mt19937& random) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (chosen_order == kDescending)
    std::reverse(order.begin(), order.end());
  if (chosen_order == kShuffled)
    std::shuffle(order.begin(), order.end(), random);
  return order;
}

void run_block(int threads, std::mt19937& random) {
  std::fill(shared.begin(), shared.end(), kPoison);
  block = Barrier{threads};
  for (int index = 0; index < threads; ++index) {
    fibers[index].is_done = false;
    fibers[index].waits_for = nullptr;
    fibers[index].exchanges = 0;
    if (index % kLanes == 0)
      warps[index / kLanes].barrier = Barrier{std::min(kLanes, threads - index)};
  }
  for (bool has_run = true; has_run;) {
    has_run = false;
    for (const int index : thread_order(threads, random))
      if (is_ready(fibers[index])) {
        resume(fibers[index], index);
        has_run = true;
      }
  }
  for (int index = 0; index < threads; ++index)
    if (!fibers[index].is_done) {
      for (Fiber& fiber : fibers)  // never to be resumed where they are
        fiber.is_started = false;
      TORCH_CHECK(false, "thread ", index, " of block (", blockIdx.x, ", ", blockIdx.y, ") waits for ever");
    }
}

void check_launch(const void* kernel, const cudaLaunchConfig_t& config) {
  TORCH_CHECK(config.gridDim.x && config.gridDim.y && config.gridDim.z, "empty grid");
  TORCH_CHECK(
      config.gridDim.x < 1u << 31 && config.gridDim.y < 1u << 16 && config.gridDim.z < 1u << 16, "grid too big");
  const unsigned threads = config.blockDim.x;
  TORCH_CHECK(config.blockDim.y == 1 && config.blockDim.z == 1, "only rows of threads are known here");
  TORCH_CHECK(threads && threads <= 1024 && threads % kLanes == 0, threads, " threads: not whole warps, or too many");
  const size_t allowed = std::max(kPlainSharedBytes, allowed_shared[kernel]);
  TORCH_CHECK(
      config.dynamicSmemBytes <= allowed, config.dynamicSmemBytes, " bytes of shared memory, allowed ", allowed);
}

// Show the warp what this lane has, and return what all lanes have.
const Exchange* exchange(const Exchange& own) {
  Warp& warp = own_warp();
  Exchange* const places = warp.places[running->exchanges++ % 2];
  places[threadIdx.x % kLanes] = own;
  wait(warp.barrier);
  for (int lane = 0; lane < kLanes; ++lane)
    TORCH_CHECK(places[lane].operation == own.operation, "lanes of a warp meet in different operations");
  return places;
}

const char* const kShuffle = "shuffle";
const char* const kMultiply = "multiply";

}  // namespace

void run_kernel(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  check_launch(kernel, config);
  const size_t floats = config.dynamicSmemBytes / sizeof(float);
  shared.assign(floats + kCanaries + 4, kPoison);
  shared_offset = (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16 / sizeof(float);
  job = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::mt19937 random(0);
  const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
  for (unsigned step = 0; step < blocks; ++step) {
    const unsigned index = chosen_order == kDescending ? blocks - 1 - step : step;
    blockIdx = dim3(index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y);
    run_block(blockDim.x, random);
    const float* const canaries = shared_memory() + floats;
    for (size_t i = 0; i < kCanaries; ++i)
      TORCH_CHECK(std::isnan(canaries[i]), "written ", i, " floats beyond the shared memory");
  }
}

float* shared_memory() {
  return shared.data() + shared_offset;
}

void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const Exchange* const lanes = exchange({kMultiply, {a[0], a[1], a[2], a[3], b[0], b[1]}});
  const int g = threadIdx.x % kLanes / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    for (int k = 0; k < 8; ++k) {
      // a[row][k] and b[k][column], as csrc/scan/cuda/device.cuh lays them out.
      const float left = lanes[row % 8 * 4 + k % 4].values[row / 8 + k / 4 * 2];
      const float right = lanes[column * 4 + k % 4].values[4 + k / 4];
      c[i] = std::fma(left, right, c[i]);
    }
  }
}

void set_order(int order) {
  chosen_order = order;
}

void set_device(int multiprocessors, int shared_bytes) {
  num_multiprocessors = multiprocessors;
  most_shared = shared_bytes;
}

}  // namespace cuda_on_cpu

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool is_count = attribute == cudaDevAttrMultiProcessorCount;
  *value = is_count ? cuda_on_cpu::num_multiprocessors : cuda_on_cpu::most_shared;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  TORCH_CHECK(value <= cuda_on_cpu::most_shared, value, " bytes are too many");
  cuda_on_cpu::allowed_shared[kernel] = value;
  return cudaSuccess;
}

void __syncthreads() {
  cuda_on_cpu::wait(cuda_on_cpu::block);
}

void __syncwarp(unsigned) {
  cuda_on_cpu::wait(cuda_on_cpu::own_warp().barrier);
}

float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  const auto* const lanes = cuda_on_cpu::exchange({cuda_on_cpu::kShuffle, {value}});
  return lanes[(threadIdx.x % cuda_on_cpu::kLanes) ^ lane_mask].values[0];
}
