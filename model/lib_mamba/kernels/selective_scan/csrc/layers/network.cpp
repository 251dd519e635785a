// A folded network as one operator: stem, layers, means over the pixels, classifier. Between two layers nothing is
// asked of Python, and the threads find the next one before they sleep.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pool.h"
#include "layers/layers.h"
#include "layers/maps.h"

namespace mobilemamba {
namespace {

using at::Tensor;

// Layers between stem and classifier.
enum Kind { kFeedForward, kBlock, kPatchMerging };

constexpr int64_t kSplit = 3;  // numbers that say how a block splits its channels

// The convolutions of the stem.
struct Stem {
  at::TensorList weights, biases;
  int64_t side, stride, padding;
};

// A layer, and the map that it makes, whose address is not known yet.
struct Layer {
  Kind kind;
  at::TensorList parameters;
  at::IntArrayRef split;
  Map out;
};

int64_t parameters_of(int64_t kind) {
  switch (kind) {
    case kFeedForward: return kFfnParameters;
    case kBlock: return kBlockParameters;
    case kPatchMerging: return kPatchMergingParameters;
    default: TORCH_CHECK(false, "layers are 0 (feed-forward), 1 (block) and 2 (downsampling), got ", kind);
  }
}

// Takes parameters, or numbers, from the front of a list.
template <class List>
List take(List& from, int64_t count, const char* name) {
  TORCH_CHECK(count >= 0 && static_cast<int64_t>(from.size()) >= count, "there are too few ", name);
  const List taken = from.slice(0, count);
  from = from.slice(count);
  return taken;
}

// What is to be done to images of one size.
struct Plan {
  Stem stem;
  Map stem_out;
  std::vector<Layer> layers;
  at::TensorList head;  // weight and bias, or nothing
  int64_t largest;      // floats of an image's largest map between two layers

  Plan(const Tensor& x, at::TensorList p, at::IntArrayRef convs, at::IntArrayRef kinds, at::IntArrayRef splits) {
    TORCH_CHECK(convs.size() == 4, "the stem is described by 4 numbers, got ", convs.size());
    const at::TensorList weights = take(p, convs[0], "parameters"), biases = take(p, convs[0], "parameters");
    stem = {weights, biases, convs[1], convs[2], convs[3]};
    stem_out = convs_shape(x, biases, stem.side, stem.stride, stem.padding);
    largest = stem_out.image;
    for (const int64_t kind : kinds) {
      const at::TensorList own = take(p, parameters_of(kind), "parameters");
      const Map& from = last();
      const Map out = kind == kPatchMerging ? patch_merging_shape(from, own) : from;
      layers.push_back({static_cast<Kind>(kind), own, take(splits, kind == kBlock ? kSplit : 0, "splits"), out});
      largest = std::max(largest, out.image);
    }
    TORCH_CHECK(splits.empty() && (p.empty() || p.size() == 2), "there are too many parameters or splits");
    head = p;
  }

  const Map& last() const { return layers.empty() ? stem_out : layers.back().out; }
  int64_t columns() const { return head.empty() ? last().channels : head[1].numel(); }
};

Tensor network(
    const Tensor& x, at::TensorList parameters, at::IntArrayRef convs, at::IntArrayRef kinds, at::IntArrayRef splits,
    at::IntArrayRef reverse, double norm_eps) {
  const Plan plan(x, parameters, convs, kinds, splits);
  const int64_t images = x.size(0), channels = plan.last().channels;
  const Tensor out = at::empty({images, plan.columns()}, at::TensorOptions(at::kFloat));
  // Every layer reads one of two maps and writes the other.
  const Tensor scratch = floats(images * (2 * plan.largest + channels));
  float *from_data = scratch.mutable_data_ptr<float>(), *to_data = from_data + images * plan.largest;
  float* mean = to_data + images * plan.largest;
  const auto placed = [](Map map, float* data) {
    map.data = data;
    return map;
  };
  Map map = placed(plan.stem_out, from_data);
  const Stem& stem = plan.stem;
  convs_into(x, stem.weights, stem.biases, stem.side, stem.stride, stem.padding, map);
  for (const Layer& layer : plan.layers) {
    const Map to = placed(layer.out, to_data);
    if (layer.kind == kFeedForward)
      ffn_into(map, images, layer.parameters, {}, to);
    else if (layer.kind == kBlock)
      block_into(map, images, layer.parameters, layer.split, reverse, norm_eps, to);
    else
      patch_merging_into(map, images, layer.parameters, to);
    map = to;
    std::swap(from_data, to_data);
  }
  float* answer = out.mutable_data_ptr<float>();
  means_into(map, images, plan.head.empty() ? answer : mean);
  if (!plan.head.empty()) {
    const Map means = map_without_gaps(1, 1, channels, mean);
    pointwise_into(
        means, images, plan.head[0], plan.head[1], {}, kNone, map_without_gaps(1, 1, plan.columns(), answer));
  }
  return out;
}

Tensor traced_network(
    const Tensor& x, at::TensorList parameters, at::IntArrayRef convs, at::IntArrayRef kinds, at::IntArrayRef splits,
    at::IntArrayRef reverse, double norm_eps) {
  return at::empty_symint({x.sym_size(0), parameters.back().sym_numel()}, x.options());
}

}  // namespace
}  // namespace mobilemamba

TORCH_LIBRARY_IMPL(mobilemamba_kernels, CPU, m) {
  m.impl("network", mobilemamba::OnOwnThreads<mobilemamba::network>::call);
}

TORCH_LIBRARY_IMPL(mobilemamba_kernels, Meta, m) {
  m.impl("network", mobilemamba::traced_network);
}
