#include "run.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../sizes.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// The least products for each thread: some 20 microseconds of work.
constexpr int64_t kWorthSharing = 1 << 19;

struct Grouping {
  std::vector<int32_t> pairs;
  std::vector<Unit> units;
};

Grouping Group(const Layer& layer) {
  const int64_t all = Product(layer.tokens, layer.top_k);
  const auto valid = [&](int64_t pair) {
    return layer.topk_ids[pair] >= 0 && layer.topk_ids[pair] < layer.num_experts;
  };
  std::vector<int64_t> first(layer.num_experts + 1, 0);
  for (int64_t pair = 0; pair < all; ++pair) {
    if (valid(pair)) ++first[layer.topk_ids[pair] + 1];
  }
  Grouping grouping;
  for (int64_t expert = 0; expert < layer.num_experts; ++expert) {
    const int64_t tokens = first[expert + 1];
    first[expert + 1] += first[expert];
    if (tokens == 0) continue;
    // Parts of about one size: multiples of eight, except the last.
    const int64_t parts = (tokens + kTaskTokens - 1) / kTaskTokens;
    const int64_t part = (tokens + 8 * parts - 1) / (8 * parts) * 8;
    for (int64_t begin = 0; begin < tokens; begin += part) {
      grouping.units.push_back({static_cast<int32_t>(expert),
                                static_cast<int32_t>(std::min(part, tokens - begin)),
                                first[expert] + begin});
    }
  }
  grouping.pairs.resize(first[layer.num_experts]);
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t pair = 0; pair < all; ++pair) {
    if (valid(pair)) grouping.pairs[next[layer.topk_ids[pair]]++] = static_cast<int32_t>(pair);
  }
  return grouping;
}

int64_t Tasks(int64_t columns, int64_t chunk) { return (columns + chunk - 1) / chunk; }

// Columns of a task: `most`, or fewer where that would leave threads idle.
int64_t Chunk(int64_t columns, int64_t most, int64_t units, int64_t threads) {
  int64_t chunk = most;
  while (chunk > kBlock && units * Tasks(columns, chunk) < 16 * threads) chunk /= 2;
  return chunk;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory of a call, freed at its end.
class Memory {
 public:
  template <class T>
  T* New(int64_t count) {
    const int64_t bytes = RoundUp(Product(std::max<int64_t>(count, 1), sizeof(T)), 64);
    blocks_.emplace_back(std::aligned_alloc(64, bytes));
    if (blocks_.back() == nullptr) throw std::bad_alloc();
    return static_cast<T*>(blocks_.back().get());
  }

  void* Operands(Form form, int64_t blocks) {
    switch (form) {
      case Form::kE2m1:
        return New<E2m1Block>(blocks);
      case Form::kFp32:
        return New<Fp32Block>(blocks);
      case Form::kBf16:
        return New<Bf16Block>(blocks);
    }
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<void, Free>> blocks_;
};

}  // namespace

void Run(Layer layer, const Stages& stages, int64_t threads, const Schedule& schedule) {
  const int64_t tokens = layer.tokens;
  const Grouping grouping = Group(layer);
  layer.pairs = grouping.pairs.data();
  layer.units = grouping.units.data();
  layer.num_pairs = grouping.pairs.size();
  layer.num_units = grouping.units.size();

  const int64_t products = Product(
      layer.num_pairs, Sum(layer.w13.rows, layer.intermediate_size), layer.hidden_size);
  threads = std::max<int64_t>(1, std::min(threads, products / kWorthSharing));
  layer.hidden_chunk = Chunk(layer.intermediate_size, stages.rows / 2, layer.num_units, threads);
  layer.output_chunk = Chunk(layer.hidden_size, stages.rows, layer.num_units, threads);

  layer.form = layer.scheme != Scheme::kNone                            ? Form::kE2m1
               : stages.bf16 && layer.rounding == Rounding::kBfloat16   ? Form::kBf16
                                                                        : Form::kFp32;
  Memory memory;
  const bool per_token = layer.scheme == Scheme::kPerToken;
  const int64_t input_blocks = Product(tokens, layer.hidden_size / kBlock);
  const int64_t hidden_blocks = Product(layer.num_pairs, layer.intermediate_size / kBlock);
  layer.input = memory.Operands(layer.form, input_blocks);
  layer.input_global = memory.New<float>(tokens);
  layer.hidden = memory.Operands(layer.form, hidden_blocks);
  layer.hidden_values =
      per_token ? memory.New<float>(Product(layer.num_pairs, layer.intermediate_size)) : nullptr;
  layer.hidden_global = per_token ? memory.New<float>(layer.num_pairs) : nullptr;
  const int64_t outputs = Product(tokens, layer.top_k, layer.hidden_size);
  if (layer.rounding == Rounding::kBfloat16) {
    layer.outputs = {memory.New<uint16_t>(outputs), true};
  } else {
    layer.outputs = {memory.New<float>(outputs), false};
  }

  const auto stage = [&](int64_t tasks, void (*run)(const Layer&, int64_t, void*)) {
    return Stage{tasks, [layer, run](int64_t task, void* scratch) { run(layer, task, scratch); }};
  };
  RunStages(
      {
          stage(tokens, stages.input),
          stage(Product(layer.num_units, Tasks(layer.intermediate_size, layer.hidden_chunk)),
                stages.hidden),
          stage(per_token ? layer.num_pairs : 0, stages.requantize),
          stage(Product(layer.num_units, Tasks(layer.hidden_size, layer.output_chunk)),
                stages.output),
          stage(Product(tokens, Tasks(layer.hidden_size, kCombineChunk)), stages.combine),
      },
      threads - 1, schedule);
}

void RunCombine(Layer layer, const Stages& stages, int64_t threads, const Schedule& schedule) {
  layer.summed = true;
  const int64_t additions = Product(layer.tokens, layer.top_k, layer.hidden_size);
  threads = std::max<int64_t>(1, std::min(threads, additions / kWorthSharing));
  RunStages(
      {{Product(layer.tokens, Tasks(layer.hidden_size, kCombineChunk)),
        [layer, run = stages.combine](int64_t task, void* scratch) { run(layer, task, scratch); }}},
      threads - 1, schedule);
}

}  // namespace jax_nvfp4_moe::cpu
