// The fibers, and the operators of the CUDA sources under a name of their own, for CPU tensors.
#include <setjmp.h>
#include <torch/library.h>
#include <ucontext.h>

#include <cuda_runtime.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "gated_scan.cu"
#include "selective_scan.cu"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 99 * 1024;  // the smallest limit of the GPUs that the kernels are for
alignas(16) float shared[kSharedBytes / sizeof(float)];

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  unsigned index;
  State state = State::kReady;
  bool has_started = false;
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

// What the lanes of a warp show each other.
struct Exchange {
  float value[32], a[32][4], b[32][2];
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Exchange> exchanges;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
int multiprocessors = 4;

void enter() {
  (*body)();
  current->state = State::kDone;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = dim3(fiber.index);
  if (_setjmp(scheduler))
    return;
  if (fiber.has_started)
    _longjmp(fiber.at, 1);
  fiber.has_started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

void wait(State state) {
  current->state = state;
  if (!_setjmp(current->at))
    _longjmp(scheduler, 1);
}

// Let go the threads [first, last) if all that are not done wait at this barrier.
bool release(size_t first, size_t last, State barrier) {
  bool is_anyone = false;
  for (size_t i = first; i < last; ++i) {
    if (fibers[i]->state != barrier && fibers[i]->state != State::kDone)
      return false;
    is_anyone |= fibers[i]->state == barrier;
  }
  for (size_t i = first; i < last; ++i)
    if (fibers[i]->state == barrier)
      fibers[i]->state = State::kReady;
  return is_anyone;
}

void run_block(size_t threads, std::minstd_rand& random) {
  std::fill(std::begin(shared), std::end(shared), std::numeric_limits<float>::quiet_NaN());
  for (size_t i = 0; i < threads; ++i) {
    fibers[i]->index = i;
    fibers[i]->state = State::kReady;
    fibers[i]->has_started = false;
  }
  std::vector<size_t> warps(threads / 32), lanes(32);
  for (size_t i = 0; i < warps.size(); ++i)
    warps[i] = i;
  for (size_t i = 0; i < lanes.size(); ++i)
    lanes[i] = i;
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (const size_t warp : warps) {
      // A warp runs on for a random number of its barriers before another one's turn.
      for (unsigned turns = 1 + random() % 8; turns; --turns) {
        std::shuffle(lanes.begin(), lanes.end(), random);
        for (const size_t lane : lanes)
          if (fibers[warp * 32 + lane]->state == State::kReady)
            resume(*fibers[warp * 32 + lane]);
        if (!release(warp * 32, warp * 32 + 32, State::kAtWarp))
          break;
      }
    }
    const auto is_in = [&](State state) {
      return std::any_of(fibers.begin(), fibers.begin() + threads, [&](auto& own) { return own->state == state; });
    };
    if (is_in(State::kReady) || release(0, threads, State::kAtBlock))
      continue;
    if (is_in(State::kAtWarp) || is_in(State::kAtBlock))
      throw std::runtime_error("a barrier is not reached by all threads");
    return;
  }
}

}  // namespace

void __syncthreads() {
  wait(State::kAtBlock);
}

void __syncwarp(unsigned) {
  wait(State::kAtWarp);
}

float __shfl_xor_sync(unsigned, float value, int lanes) {
  Exchange& own = exchanges[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  own.value[lane] = value;
  __syncwarp();
  const float result = own.value[lane ^ lanes];
  __syncwarp();
  return result;
}

void emulator::run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  if (block.x % 32 || block.x > 1024 || shared_bytes > kSharedBytes || !grid.x || !grid.y || grid.y > 65535)
    throw std::runtime_error("no GPU could launch this");
  while (fibers.size() < block.x)
    fibers.push_back(std::make_unique<Fiber>());
  exchanges.resize(block.x / 32);
  body = &thread;
  gridDim = grid;
  blockDim = block;
  std::minstd_rand random(grid.x * 31 + block.x);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(block.x, random);
    }
}

at::cuda::Properties* at::cuda::getCurrentDeviceProperties() {
  static Properties properties;
  properties = {multiprocessors, kSharedBytes};
  return &properties;
}

namespace mobilemamba {

float* shared_memory() {
  return shared;
}

// To nearest, ties away from zero.
float round_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000) != 0x7f800000)
    bits += 0x1000;
  bits &= 0xffffe000;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  Exchange& own = exchanges[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  for (const float value : {a[0], a[1], a[2], a[3], b[0], b[1]})
    if (value == value && round_tf32(value) != value)
      throw std::runtime_error("a factor has more bits than the tensor cores take");
  std::copy(a, a + 4, own.a[lane]);
  std::copy(b, b + 2, own.b[lane]);
  __syncwarp();
  const auto element_a = [&](unsigned row, unsigned k) { return own.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]; };
  const auto element_b = [&](unsigned k, unsigned column) { return own.b[column * 4 + k % 4][k / 4]; };
  for (unsigned i = 0; i < 4; ++i) {
    double total = c[i];
    for (unsigned k = 0; k < 8; ++k)
      total += static_cast<double>(element_a(lane / 4 + i / 2 * 8, k)) * element_b(k, lane % 4 * 2 + i % 2);
    c[i] = static_cast<float>(total);
  }
  __syncwarp();
}

}  // namespace mobilemamba

TORCH_LIBRARY(mobilemamba_emulated, m) {
  m.def("set_multiprocessors(int count) -> ()", [](int64_t count) { multiprocessors = static_cast<int>(count); });
  m.def("selective_scan", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mobilemamba::selective_scan_cuda)));
  m.def(
      "selective_scan_backward",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mobilemamba::selective_scan_backward_cuda)));
  m.def("gated_scan", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mobilemamba::gated_scan_cuda)));
  m.def(
      "gated_scan_backward",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(mobilemamba::gated_scan_backward_cuda)));
}
