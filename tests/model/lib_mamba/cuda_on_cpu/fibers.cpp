// Clusters of blocks one after the other, and within a cluster the threads of all its blocks as fibers: each runs until
// it has to wait for others.
//
// Between two barriers each thread runs ahead of the next ones, in an order that can be chosen. A value that another
// thread has not yet written, or has yet to read, is then wrong every time, on a GPU only rarely: results that differ
// between two orders mean a missing barrier. Barriers that not all threads reach are found too, and reads of shared
// memory that was not written or not requested.
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <setjmp.h>
#include <ucontext.h>

#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;
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
  std::vector<std::set<const void*>> loads;  // of words, the n-th of each lane
  Exchange places[2][kLanes];
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<float> memory;
  int running = 0;  // threads that have not ended

  float* shared() {
    const size_t offset = (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / sizeof(float);
    return memory.data() + offset;
  }
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  jmp_buf where;
  bool is_started = false, is_done = true;
  const Barrier* waits_for = nullptr;
  int generation = 0, exchanges = 0, loads = 0;
  int thread = 0, cluster_generation = 0;
  Block* block = nullptr;
  std::vector<std::pair<float4*, const void*>> copies;  // that have not arrived
};

std::vector<std::unique_ptr<Fiber>> fibers;  // of a cluster, block by block
std::vector<Block> blocks;
Barrier cluster;
Fiber* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* job = nullptr;
std::map<const void*, size_t> allowed_shared;
std::map<const void*, bool> allowed_large_clusters;
int num_multiprocessors = 132, most_shared = 227 * 1024, most_cluster = 16;
int chosen_order = kAscending;
int64_t bytes_loaded = 0, bytes_stored = 0;

Warp& own_warp() {
  return running->block->warps[threadIdx.x / kLanes];
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
    --running->block->running;
    for (Barrier* barrier : {&running->block->barrier, &own_warp().barrier, &cluster}) {
      --barrier->expected;
      barrier->release_if_complete();
    }
    yield();
  }
}

// Run a thread until it waits or ends.
void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = dim3(fiber.thread, 0, 0);
  blockIdx = fiber.block->index;
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

// Run blocks [first, first + size) of the grid, which are a cluster.
void run_cluster(unsigned first, unsigned size, size_t floats, std::mt19937& random) {
  const int threads = blockDim.x, all = threads * size;
  while (fibers.size() < static_cast<size_t>(all))
    fibers.push_back(std::make_unique<Fiber>());
  blocks.resize(size);
  cluster = Barrier{all};
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = blocks[rank];
    const unsigned index = first + rank;
    block.index = dim3(index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y);
    block.barrier = Barrier{threads};
    block.running = threads;
    block.warps.assign(threads / kLanes, {});
    for (Warp& warp : block.warps)
      warp.barrier = Barrier{kLanes};
    block.memory.assign(floats + kCanaries + 4, kPoison);
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = *fibers[rank * threads + thread];
      fiber.is_done = false;
      fiber.waits_for = nullptr;
      fiber.exchanges = fiber.loads = 0;
      fiber.cluster_generation = 0;
      fiber.thread = thread;
      fiber.block = &block;
      fiber.copies.clear();
    }
  }
  for (bool has_run = true; has_run;) {
    has_run = false;
    for (const int index : thread_order(all, random))
      if (is_ready(*fibers[index])) {
        resume(*fibers[index]);
        has_run = true;
      }
  }
  for (int index = 0; index < all; ++index)
    if (const Fiber& stuck = *fibers[index]; !stuck.is_done) {
      const dim3 block = stuck.block->index;
      fibers.clear();  // never to be resumed where they are
      TORCH_CHECK(false, "thread ", index % threads, " of block (", block.x, ", ", block.y, ") waits for ever");
    }
  for (Block& block : blocks)
    for (size_t i = 0; i < kCanaries; ++i)
      TORCH_CHECK(std::isnan(block.shared()[floats + i]), "written ", i, " floats beyond the shared memory");
}

unsigned cluster_blocks(const cudaLaunchConfig_t& config) {
  return config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
}

void check_launch(const void* kernel, const cudaLaunchConfig_t& config) {
  TORCH_CHECK(config.gridDim.x && config.gridDim.y && config.gridDim.z, "empty grid");
  TORCH_CHECK(
      config.gridDim.x < 1u << 31 && config.gridDim.y < 1u << 16 && config.gridDim.z < 1u << 16, "grid too big");
  const unsigned threads = config.blockDim.x;
  TORCH_CHECK(config.blockDim.y == 1 && config.blockDim.z == 1, "only rows of threads are known here");
  TORCH_CHECK(threads && threads <= 1024 && threads % kLanes == 0, threads, " threads: not whole warps, or too many");
  const unsigned size = cluster_blocks(config);
  TORCH_CHECK(size >= 1 && config.gridDim.x % size == 0, "a grid of ", config.gridDim.x, " in clusters of ", size);
  TORCH_CHECK(
      size <= (allowed_large_clusters[kernel] ? 16u : 8u) && size <= static_cast<unsigned>(most_cluster),
      "clusters of ", size, " blocks are too large");
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
  RECORD_FUNCTION("launch", {});  // for a profiler
  check_launch(kernel, config);
  job = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::mt19937 random(0);
  const unsigned size = cluster_blocks(config), clusters = gridDim.x * gridDim.y * gridDim.z / size;
  for (unsigned step = 0; step < clusters; ++step) {
    const unsigned index = chosen_order == kDescending ? clusters - 1 - step : step;
    run_cluster(index * size, size, config.dynamicSmemBytes / sizeof(float), random);
  }
}

float* shared_memory() {
  return running->block->shared();
}

const float* shared_memory_of(int rank) {
  Block& block = blocks.at(rank);
  TORCH_CHECK(block.running > 0, "block ", rank, " of the cluster has ended, and its shared memory is read");
  return block.shared();
}

void cluster_arrive() {
  running->cluster_generation = cluster.generation;
  ++cluster.arrived;
  cluster.release_if_complete();
}

void cluster_wait() {
  if (cluster.generation != running->cluster_generation)
    return;
  running->waits_for = &cluster;
  running->generation = running->cluster_generation;
  yield();
}

void copy_ahead(float4* to, const void* from) {
  std::fill_n(reinterpret_cast<float*>(to), 4, kPoison);
  running->copies.emplace_back(to, from);
}

void wait_for_copies() {
  for (const auto& [to, from] : running->copies) {
    *to = {};
    if (!from)
      continue;
    *to = *static_cast<const float4*>(from);
    for (int i = 0; i < 4; ++i)
      count_load(static_cast<const uint32_t*>(from) + i);
  }
  running->copies.clear();
}

void count_load(const void* word) {
  auto& loads = own_warp().loads;
  const size_t own = running->loads++;
  if (loads.size() <= own)
    loads.resize(own + 1);
  bytes_loaded += loads[own].insert(word).second ? sizeof(uint32_t) : 0;
}

void count_store(int64_t bytes) {
  bytes_stored += bytes;
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

void set_device(int multiprocessors, int shared_bytes, int most_cluster_blocks) {
  num_multiprocessors = multiprocessors;
  most_shared = shared_bytes;
  most_cluster = most_cluster_blocks;
}

std::pair<int64_t, int64_t> take_traffic() {
  const std::pair<int64_t, int64_t> traffic(bytes_loaded, bytes_stored);
  bytes_loaded = bytes_stored = 0;
  return traffic;
}

}  // namespace cuda_on_cpu

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount)
    *value = cuda_on_cpu::num_multiprocessors;
  else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    *value = cuda_on_cpu::most_shared;
  else
    *value = cuda_on_cpu::most_cluster > 1;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    cuda_on_cpu::allowed_large_clusters[kernel] = value;
    return cudaSuccess;
  }
  TORCH_CHECK(value <= cuda_on_cpu::most_shared, value, " bytes are too many");
  cuda_on_cpu::allowed_shared[kernel] = value;
  return cudaSuccess;
}

// One block a multiprocessor.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const int size = config->attrs[0].val.clusterDim.x;
  *clusters = size <= cuda_on_cpu::most_cluster ? std::max(cuda_on_cpu::num_multiprocessors / size, 1) : 0;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

void __syncthreads() {
  cuda_on_cpu::wait(cuda_on_cpu::running->block->barrier);
}

void __syncwarp(unsigned) {
  cuda_on_cpu::wait(cuda_on_cpu::own_warp().barrier);
}

float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  const auto* const lanes = cuda_on_cpu::exchange({cuda_on_cpu::kShuffle, {value}});
  return lanes[(threadIdx.x % cuda_on_cpu::kLanes) ^ lane_mask].values[0];
}
