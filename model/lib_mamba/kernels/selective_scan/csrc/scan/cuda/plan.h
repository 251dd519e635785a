// How the work is divided where kernels hold states of one channel a lane.
#pragma once

#include <algorithm>

#include "scan/cuda/gated_scan_fused.cuh"
#include "scan/cuda/gated_scan_split.cuh"
#include "scan/cuda/tensors.h"

namespace mobilemamba {

constexpr int kMaxFusedRank = 32;
constexpr int kMaxFusedLength = 64;  // up to here one block is enough for an image, however few images there are

// One block an image: where there are images enough to fill the GPU, or little to do in each.
template <int NR>
bool is_fused(const ScanTensors& scan) {
  const bool is_enough = 2 * scan.batch >= num_multiprocessors() || scan.length <= kMaxFusedLength;
  return is_enough && scan.groups() * kLanes <= kFusedThreads && scan.rank <= kMaxFusedRank &&
         fits_shared(fused_shared_floats<NR>(scan.groups()));
}

// How the work of a kernel is divided into blocks of channels and segments of positions.
struct Plan {
  int groups, segments, blocks;

  // As many channels in a block as there are warps, or one warp's for each of many segments where blocks are few.
  template <typename SharedFloats>
  Plan(const ScanTensors& scan, int max_groups, int max_segments, SharedFloats&& shared_floats) {
    blocks = ceil_div(scan.groups(), max_groups);
    groups = ceil_div(scan.groups(), blocks);
    segments = 1;
    if (scan.batch * blocks < num_multiprocessors() && scan.chunks() > 1) {
      groups = 1;
      segments = std::min(max_segments, scan.chunks());
    }
    while (!fits_shared(shared_floats(groups, segments)))
      (segments > 1 ? segments : groups) /= 2;
    segments = ceil_div(scan.chunks(), ceil_div(scan.chunks(), segments));  // none of them empty
    blocks = ceil_div(scan.groups(), groups);
  }

  int threads() const { return groups * segments * kLanes; }
};

// The sum of both directions.
template <typename T, int NR>
void run_split(const ScanTensors& scan, Tensor& sum) {
  const auto shared_floats = [](int groups, int segments) { return split_shared_floats<NR>(groups, segments); };
  const Plan plan(scan, 8, kSplitThreads / kLanes, shared_floats);
  launch(
      split_kernel<T, NR>, dim3(scan.batch, plan.blocks), plan.threads(), shared_floats(plan.groups, plan.segments),
      scan.inputs<T>(), plan.segments, sum.mutable_data_ptr<float>());
}

template <typename T, int NR>
void launch_fused(const ScanTensors& scan, const NormTensors& norm, Tensor& y, float2* statistics) {
  launch(
      fused_kernel<T, NR>, dim3(scan.batch), scan.groups() * kLanes, fused_shared_floats<NR>(scan.groups()),
      scan.inputs<T>(), norm.inputs<T>(), y.mutable_data_ptr<T>(), statistics);
}

}  // namespace mobilemamba
