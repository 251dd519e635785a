// The CUDA operators, for CPU tensors; and the settings of the tests.
#include <c10/core/Allocator.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include "fibers.h"
#include "scan/scan.h"

namespace {

// Puts every tensor right in front of a protected page, and NaN into it.
struct GuardedAllocator final : c10::Allocator {
  static size_t mapped_bytes(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page + page;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0)
      return {nullptr, c10::Device(c10::kCPU)};
    const size_t page = sysconf(_SC_PAGESIZE), mapped = mapped_bytes(bytes);
    char* const start =
        static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TORCH_CHECK(start != MAP_FAILED, "out of memory");
    mprotect(start + mapped - page, page, PROT_NONE);
    char* const data = start + (mapped - page - bytes) / 16 * 16;
    std::memset(data, 0xff, bytes);
    return {data, new Mapping{start, mapped}, &release, c10::Device(c10::kCPU)};
  }
  struct Mapping {
    char* start;
    size_t bytes;
  };
  static void release(void* context) {
    auto* const mapping = static_cast<Mapping*>(context);
    munmap(mapping->start, mapping->bytes);
    delete mapping;
  }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};

GuardedAllocator guarded;
c10::Allocator* plain = nullptr;

void guard_memory(bool is_guarded) {
  if (!plain)
    plain = c10::GetAllocator(c10::kCPU);
  c10::SetAllocator(c10::kCPU, is_guarded ? &guarded : plain, 255);
}

void set_device(int64_t multiprocessors, int64_t shared_bytes, int64_t most_cluster_blocks) {
  cuda_on_cpu::set_device(
      static_cast<int>(multiprocessors), static_cast<int>(shared_bytes), static_cast<int>(most_cluster_blocks));
}

std::tuple<int64_t, int64_t> take_traffic() {
  return cuda_on_cpu::take_traffic();
}

void set_order(int64_t order) {
  cuda_on_cpu::set_order(static_cast<int>(order));
}

}  // namespace

TORCH_LIBRARY(mobilemamba_cuda_on_cpu, m) {
  m.def("guard_memory", &guard_memory);
  m.def("set_device(int multiprocessors, int shared_bytes, int most_cluster_blocks=16) -> ()", &set_device);
  m.def("set_order", &set_order);
  m.def("take_traffic", &take_traffic);
  m.def("gated_scan", &mobilemamba::gated_scan_cuda);
  m.def("gated_scan_with_states", &mobilemamba::gated_scan_with_states_cuda);
  m.def(
      "gated_scan_backward(Tensor grad, Tensor x, Tensor z, Tensor projection, Tensor dt_weight, Tensor dt_bias, "
      "Tensor A_log, Tensor D_skip, Tensor norm_weight, Tensor norm_bias, float eps, int[] reverse, "
      "Tensor? states=None, Tensor? statistics=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)",
      &mobilemamba::gated_scan_backward_cuda);
  m.def("selective_scan", &mobilemamba::selective_scan_cuda);
  m.def("selective_scan_backward", &mobilemamba::selective_scan_backward_cuda);
}
