// The stages of a call, for the engines of an instruction set.

#ifndef JAX_NVFP4_MOE_CPU_STAGES_H_
#define JAX_NVFP4_MOE_CPU_STAGES_H_

#include "floats.h"
#include "layer.h"
#include "products.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// ------------------------------------------------------------------------------------- operands

// Loads a vector from element `at` on.
INLINE Floats LoadFrom(const Elements& from, int64_t at) {
  return from.bf16 ? LoadHalves(static_cast<const uint16_t*>(from.data) + at)
                     : Load(static_cast<const float*>(from.data) + at);
}

// Stores a vector from element `at` on. For bfloat16, x is rounded already.
INLINE void StoreTo(const Elements& to, int64_t at, const Floats& x) {
  if (to.bf16) {
    StoreHalves(static_cast<uint16_t*>(to.data) + at, x);
  } else {
    Store(static_cast<float*>(to.data) + at, x);
  }
}

INLINE float AbsMax(const Elements& x, int64_t start, int64_t count) {  // NaN if there is one
  Ints most = {};
  for (int64_t i = 0; i < count; i += kWidth) most = MaxBits(most, LoadFrom(x, start + i));
  return Largest(most);
}

// The blocks of a pair or a token.
template <class Block>
INLINE Block* RowOf(void* operands, int64_t row, int64_t columns) {
  return static_cast<Block*>(operands) + row * (columns / kBlock);
}

// Where the operands of products are written, block by block.
struct Operands {
  Form form;
  void* blocks;

  INLINE void Quantized(int64_t block, const Floats* x, float encode) const {
    Quantize(x, encode, static_cast<E2m1Block*>(blocks) + block);
  }

  INLINE void Plain(int64_t at, const Floats& x) const {
    StoreTo({blocks, form == Form::kBf16}, at, x);
  }
};

INLINE Operands InputOf(const Layer& layer) { return {layer.form, layer.input}; }
INLINE Operands HiddenOf(const Layer& layer) { return {layer.form, layer.hidden}; }

// Makes row `row` of `to` from row `row` of x; returns its decode scale.
INLINE float MakeOperand(const Layer& layer, const Operands& to, int64_t row, const Elements& x,
                         int64_t columns, float static_scale) {
  const int64_t start = row * columns, end = start + columns;
  if (layer.form != Form::kE2m1) {
    for (int64_t i = start; i < end; i += kWidth) to.Plain(i, LoadFrom(x, i));
    return 1.0f;
  }
  const bool per_token = layer.scheme == Scheme::kPerToken;
  const float scale = per_token ? ScaleFor(AbsMax(x, start, columns)) : static_scale;
  const float encode = Reciprocal(scale);
  for (int64_t i = start; i < end; i += kBlock) {
    Floats parts[kParts];
    for (int64_t part = 0; part < kParts; ++part) parts[part] = LoadFrom(x, i + part * kWidth);
    to.Quantized(i / kBlock, parts, encode);
  }
  return scale;
}

void Input(const Layer& layer, int64_t token, void*) {
  layer.input_global[token] =
      MakeOperand(layer, InputOf(layer), token, layer.x, layer.hidden_size, layer.w13_input_scale);
}

void Requantize(const Layer& layer, int64_t pair, void*) {
  layer.hidden_global[pair] = MakeOperand(layer, HiddenOf(layer), pair,
                                          {layer.hidden_values, false}, layer.intermediate_size, 0);
}

// Multiplies rows with tokens. The sums go to the scratch, each token's `stride` after the one
// before.
template <class Engine>
INLINE void MultiplyTokens(const Rows& rows, const Operands& operands, const int64_t* tokens,
                           int64_t num_tokens, int64_t stride, Scratch* scratch) {
  using Block = typename Engine::Block;
  const int64_t columns = rows.matrix->columns;
  const Block* blocks[kTaskTokens];
  for (int64_t t = 0; t < num_tokens; ++t) {
    blocks[t] = RowOf<const Block>(operands.blocks, tokens[t], columns);
  }
  if constexpr (Engine::kTiles) {
    if (num_tokens > Engine::kTilesBeyond) {
      return Engine::MultiplyByTiles(rows, blocks, num_tokens, scratch->sums, stride, scratch);
    }
  }
  Multiply<Engine>(rows, blocks, num_tokens, scratch->sums, stride, scratch);
}

// ------------------------------------------------------------------------------------- GEMM1

// Scales, bias, activation and requantisation of one pair's columns `first` .. `first + count - 1`
// of I.
INLINE void FinishHidden(const Layer& layer, const Unit& unit, int64_t place, float global,
                         const float* sums, int64_t first, int64_t count) {
  const int64_t columns = layer.intermediate_size, groups = layer.gated ? 2 : 1;
  const float* const scales = layer.global_scale13 + unit.expert * groups;
  const float* const bias =
      layer.bias13 == nullptr ? nullptr : layer.bias13 + unit.expert * groups * columns;
  const bool quantised = layer.scheme != Scheme::kNone;
  const float gate_scale = quantised ? scales[0] * global : scales[0];
  const float up_scale = quantised ? scales[groups - 1] * global : scales[groups - 1];
  const Operands to = HiddenOf(layer);
  const float encode = layer.scheme == Scheme::kStatic ? Reciprocal(layer.w2_input_scale) : 0.0f;
  for (int64_t block = 0; block < count; block += kBlock) {
    Floats hidden[kParts];
    const int64_t at = place * columns + first + block;
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t i = block + part * kWidth;
      Floats up = Load(sums + (groups - 1) * count + i) * up_scale;
      Floats gate = layer.gated ? Load(sums + i) * gate_scale : up;
      if (bias != nullptr) {
        up += Load(bias + (groups - 1) * columns + first + i);
        if (layer.gated) gate += Load(bias + first + i);
      }
      hidden[part] = Activate(gate, up, layer);
      if (layer.scheme == Scheme::kPerToken) {
        // The kernels write bfloat16 here and quantise it in a pass of its own
        // (flashinfer-python@0.6.13:data/csrc/trtllm_fused_moe_runner.cu:797-826).
        Store(layer.hidden_values + at + part * kWidth, ToBfloat16(hidden[part]));
      } else if (layer.scheme == Scheme::kNone) {
        to.Plain(at + part * kWidth, Round(hidden[part], layer.rounding));
      }
    }
    if (layer.scheme == Scheme::kStatic) {
      to.Quantized(at / kBlock, hidden, encode);
    }
  }
}

template <class Engine>
INLINE void Hidden(const Layer& layer, int64_t task, Scratch* scratch) {
  const int64_t columns = layer.intermediate_size, chunk = layer.hidden_chunk;
  const int64_t tasks = (columns + chunk - 1) / chunk;
  const Unit& unit = layer.units[task / tasks];
  const int64_t first = task % tasks * chunk;
  const int64_t count = columns - first < chunk ? columns - first : chunk;
  const Rows rows = {&layer.w13, unit.expert, {first, columns + first}, layer.gated ? 2 : 1, count};

  int64_t tokens[kTaskTokens];
  for (int64_t t = 0; t < unit.tokens; ++t) tokens[t] = layer.pairs[unit.first + t] / layer.top_k;
  MultiplyTokens<Engine>(rows, InputOf(layer), tokens, unit.tokens, rows.count(), scratch);
  for (int64_t t = 0; t < unit.tokens; ++t) {
    const int64_t place = unit.first + t;
    FinishHidden(layer, unit, place, layer.input_global[layer.pairs[place] / layer.top_k],
                 scratch->sums + t * rows.count(), first, count);
  }
}

// ------------------------------------------------------------------------------------- GEMM2

template <class Engine>
INLINE void Output(const Layer& layer, int64_t task, Scratch* scratch) {
  const int64_t columns = layer.hidden_size, chunk = layer.output_chunk;
  const int64_t tasks = (columns + chunk - 1) / chunk;
  const Unit& unit = layer.units[task / tasks];
  const int64_t first = task % tasks * chunk;
  const int64_t count = columns - first < chunk ? columns - first : chunk;
  const Rows rows = {&layer.w2, unit.expert, {first, 0}, 1, count};

  int64_t places[kTaskTokens];
  for (int64_t t = 0; t < unit.tokens; ++t) places[t] = unit.first + t;
  MultiplyTokens<Engine>(rows, HiddenOf(layer), places, unit.tokens, count, scratch);
  const float weight_scale = layer.global_scale2[unit.expert];
  for (int64_t t = 0; t < unit.tokens; ++t) {
    const int64_t place = unit.first + t;
    const float scale = layer.scheme == Scheme::kStatic ? weight_scale * layer.w2_input_scale
                        : layer.scheme == Scheme::kPerToken
                            ? weight_scale * layer.hidden_global[place]
                            : weight_scale;
    for (int64_t i = 0; i < count; i += kWidth) {
      Floats row = Load(scratch->sums + t * count + i) * scale;
      if (layer.bias2 != nullptr) row += Load(layer.bias2 + unit.expert * columns + first + i);
      StoreTo(layer.outputs, layer.pairs[place] * columns + first + i, Round(row, layer.rounding));
    }
  }
}

void Combine(const Layer& layer, int64_t task, void*) {
  const int64_t columns = layer.hidden_size;
  const int64_t tasks = (columns + kCombineChunk - 1) / kCombineChunk;
  const int64_t token = task / tasks, first = task % tasks * kCombineChunk;
  const int64_t end = columns - first < kCombineChunk ? columns : first + kCombineChunk;
  for (int64_t column = first; column < end; column += kWidth) {
    Floats total = {};
    for (int64_t slot = 0; slot < layer.top_k; ++slot) {
      const int64_t pair = token * layer.top_k + slot;
      const int32_t expert = layer.topk_ids == nullptr ? 0 : layer.topk_ids[pair];
      const bool valid = layer.topk_ids == nullptr || (expert >= 0 && expert < layer.num_experts);
      const Floats row = valid ? LoadFrom(layer.outputs, pair * columns + column) : Floats{};
      if (!layer.summed) {
        StoreTo(layer.result, pair * columns + column, row);
      } else {
        total += layer.weighted ? row * layer.topk_weights[pair] : row;
      }
    }
    if (layer.result.bf16) total = ToBfloat16(total);
    if (layer.summed) StoreTo(layer.result, token * columns + column, total);
  }
}

// ------------------------------------------------------------------------------------- all stages

template <class E2m1, class Fp32, class Bf16>
void HiddenTask(const Layer& layer, int64_t task, void* memory) {
  Scratch* const scratch = static_cast<Scratch*>(memory);
  switch (layer.form) {
    case Form::kE2m1:
      return Hidden<E2m1>(layer, task, scratch);
    case Form::kFp32:
      return Hidden<Fp32>(layer, task, scratch);
    case Form::kBf16:
      return Hidden<Bf16>(layer, task, scratch);
  }
}

template <class E2m1, class Fp32, class Bf16>
void OutputTask(const Layer& layer, int64_t task, void* memory) {
  Scratch* const scratch = static_cast<Scratch*>(memory);
  switch (layer.form) {
    case Form::kE2m1:
      return Output<E2m1>(layer, task, scratch);
    case Form::kFp32:
      return Output<Fp32>(layer, task, scratch);
    case Form::kBf16:
      return Output<Bf16>(layer, task, scratch);
  }
}

// The stages of a level, from its engines. Without bfloat16 instructions, `Bf16` is `Fp32`.
template <class E2m1, class Fp32, class Bf16 = Fp32>
constexpr Stages StagesOf() {
  return {!__is_same(Bf16, Fp32),
          E2m1::kTiles ? kMostRows : kFewRows,
          Input,
          HiddenTask<E2m1, Fp32, Bf16>,
          Requantize,
          OutputTask<E2m1, Fp32, Bf16>,
          Combine};
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_STAGES_H_
