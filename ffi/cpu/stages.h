// The stages of a call, for the two engines of an instruction set.

#ifndef JAX_NVFP4_MOE_CPU_STAGES_H_
#define JAX_NVFP4_MOE_CPU_STAGES_H_

#include "floats.h"
#include "layer.h"
#include "products.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// ------------------------------------------------------------------------------------- operands

INLINE float AbsMax(const float* x, int64_t count) {  // NaN if there is one
  Ints most = {};
  for (int64_t i = 0; i < count; i += kWidth) most = MaxBits(most, Load(x + i));
  return Largest(most);
}

INLINE void QuantizeAt(const float* x, float encode, Codes* to) {
  Floats parts[kParts];
  for (int64_t i = 0; i < kParts; ++i) parts[i] = Load(x + i * kWidth);
  Quantize(parts, encode, to);
}

// A row of activations as the products take it; returns its decode scale.
INLINE float ToOperand(const Layer& layer, const float* x, int64_t columns, float static_scale,
                       void* to) {
  const int64_t blocks = columns / kBlock;
  if (layer.scheme == Scheme::kNone) {
    memcpy(to, x, columns * sizeof(float));
    return 1.0f;
  }
  const bool per_token = layer.scheme == Scheme::kPerToken;
  const float scale = per_token ? ScaleFor(AbsMax(x, columns)) : static_scale;
  const float encode = Reciprocal(scale);
  for (int64_t b = 0; b < blocks; ++b) {
    QuantizeAt(x + b * kBlock, encode, static_cast<Codes*>(to) + b);
  }
  return scale;
}

// Row `row` of operands with `columns` elements each.
template <class Block>
INLINE Block* OperandRow(void* operands, int64_t row, int64_t columns) {
  return static_cast<Block*>(operands) + row * (columns / kBlock);
}

INLINE void* OperandRow(const Layer& layer, void* operands, int64_t row, int64_t columns) {
  return layer.scheme == Scheme::kNone
             ? static_cast<void*>(OperandRow<Values>(operands, row, columns))
             : static_cast<void*>(OperandRow<Codes>(operands, row, columns));
}

void Input(const Layer& layer, int64_t token, void*) {
  layer.input_global[token] =
      ToOperand(layer, layer.x + token * layer.hidden_size, layer.hidden_size, layer.input_scale,
                OperandRow(layer, layer.input, token, layer.hidden_size));
}

void Requantize(const Layer& layer, int64_t pair, void*) {
  const int64_t columns = layer.intermediate_size;
  layer.hidden_global[pair] =
      ToOperand(layer, layer.hidden_values + pair * columns, columns, layer.hidden_scale,
                OperandRow(layer, layer.hidden, pair, columns));
}

// ------------------------------------------------------------------------------------- GEMM1

// What follows the sums, for one pair's columns `first` .. `first + count - 1` of I.
INLINE void FinishHidden(const Layer& layer, const Unit& unit, int64_t place, float global,
                         const float* sums, int64_t first, int64_t count) {
  const int64_t columns = layer.intermediate_size, groups = layer.gated ? 2 : 1;
  const float* const scales = layer.global_scale13 + unit.expert * groups;
  const float* const bias =
      layer.bias13 == nullptr ? nullptr : layer.bias13 + unit.expert * groups * columns;
  const bool quantised = layer.scheme != Scheme::kNone;
  const float gate_scale = quantised ? scales[0] * global : scales[0];
  const float up_scale = quantised ? scales[groups - 1] * global : scales[groups - 1];
  const float encode = layer.scheme == Scheme::kStatic ? Reciprocal(layer.hidden_scale) : 0.0f;
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
        Store(static_cast<float*>(layer.hidden) + at + part * kWidth,
              Round(hidden[part], layer.rounding));
      }
    }
    if (layer.scheme == Scheme::kStatic) {
      Quantize(hidden, encode, static_cast<Codes*>(layer.hidden) + at / kBlock);
    }
  }
}

template <class Engine>
INLINE void Hidden(const Layer& layer, int64_t task, Scratch* scratch) {
  using Block = typename Engine::Block;
  const int64_t columns = layer.intermediate_size, chunk = layer.hidden_chunk;
  const int64_t tasks = (columns + chunk - 1) / chunk;
  const Unit& unit = layer.units[task / tasks];
  const int64_t first = task % tasks * chunk;
  const int64_t count = columns - first < chunk ? columns - first : chunk;
  const Rows rows = {&layer.w13, unit.expert, {first, columns + first}, layer.gated ? 2 : 1, count};

  const Block* operands[kTaskTokens];
  for (int64_t t = 0; t < unit.tokens; ++t) {
    const int64_t token = layer.pairs[unit.first + t] / layer.top_k;
    operands[t] = OperandRow<Block>(layer.input, token, layer.hidden_size);
  }
  Multiply<Engine>(rows, operands, unit.tokens, scratch->sums, rows.count(), scratch);
  for (int64_t t = 0; t < unit.tokens; ++t) {
    const int64_t place = unit.first + t;
    FinishHidden(layer, unit, place, layer.input_global[layer.pairs[place] / layer.top_k],
                 scratch->sums + t * rows.count(), first, count);
  }
}

// ------------------------------------------------------------------------------------- GEMM2

INLINE bool Narrow(const Layer& layer) { return layer.rounding == Rounding::kBfloat16; }

template <class Engine>
INLINE void Output(const Layer& layer, int64_t task, Scratch* scratch) {
  using Block = typename Engine::Block;
  const int64_t columns = layer.hidden_size, chunk = layer.output_chunk;
  const int64_t tasks = (columns + chunk - 1) / chunk;
  const Unit& unit = layer.units[task / tasks];
  const int64_t first = task % tasks * chunk;
  const int64_t count = columns - first < chunk ? columns - first : chunk;
  const Rows rows = {&layer.w2, unit.expert, {first, 0}, 1, count};

  const Block* operands[kTaskTokens];
  for (int64_t t = 0; t < unit.tokens; ++t) {
    operands[t] = OperandRow<Block>(layer.hidden, unit.first + t, layer.intermediate_size);
  }
  Multiply<Engine>(rows, operands, unit.tokens, scratch->sums, count, scratch);
  const float weight_scale = layer.global_scale2[unit.expert];
  for (int64_t t = 0; t < unit.tokens; ++t) {
    const int64_t place = unit.first + t;
    const float scale = layer.scheme == Scheme::kStatic     ? weight_scale * layer.hidden_scale
                        : layer.scheme == Scheme::kPerToken ? weight_scale * layer.hidden_global[place]
                                                            : weight_scale;
    for (int64_t i = 0; i < count; i += kWidth) {
      Floats row = Load(scratch->sums + t * count + i) * scale;
      if (layer.bias2 != nullptr) row += Load(layer.bias2 + unit.expert * columns + first + i);
      row = Round(row, layer.rounding);
      const int64_t at = layer.pairs[place] * columns + first + i;
      if (Narrow(layer)) {
        const Ints bits = Bits(row);
        uint16_t* const to = static_cast<uint16_t*>(layer.outputs) + at;
        for (int64_t j = 0; j < kWidth; ++j) to[j] = static_cast<uint32_t>(bits[j]) >> 16;
      } else {
        Store(static_cast<float*>(layer.outputs) + at, row);
      }
    }
  }
}

INLINE Floats LoadOutput(const Layer& layer, int64_t at) {
  if (!Narrow(layer)) return Load(static_cast<const float*>(layer.outputs) + at);
  const uint16_t* const from = static_cast<const uint16_t*>(layer.outputs) + at;
  Ints bits;
  for (int64_t j = 0; j < kWidth; ++j) bits[j] = static_cast<int32_t>(from[j]) << 16;
  return FromBits(bits);
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
      const int32_t expert = layer.topk_ids[pair];
      const bool valid = expert >= 0 && expert < layer.num_experts;
      const Floats row = valid ? LoadOutput(layer, pair * columns + column) : Floats{};
      if (!layer.summed) {
        Store(layer.result + pair * columns + column, row);
      } else {
        total += layer.weighted ? row * layer.topk_weights[pair] : row;
      }
    }
    if (layer.summed) Store(layer.result + token * columns + column, total);
  }
}

// ------------------------------------------------------------------------------------- the table

template <class ForCodes, class ForValues>
void HiddenTask(const Layer& layer, int64_t task, void* scratch) {
  if (layer.scheme == Scheme::kNone) {
    Hidden<ForValues>(layer, task, static_cast<Scratch*>(scratch));
  } else {
    Hidden<ForCodes>(layer, task, static_cast<Scratch*>(scratch));
  }
}

template <class ForCodes, class ForValues>
void OutputTask(const Layer& layer, int64_t task, void* scratch) {
  if (layer.scheme == Scheme::kNone) {
    Output<ForValues>(layer, task, static_cast<Scratch*>(scratch));
  } else {
    Output<ForCodes>(layer, task, static_cast<Scratch*>(scratch));
  }
}

template <class ForCodes, class ForValues>
constexpr Stages StagesOf() {
  return {Input, HiddenTask<ForCodes, ForValues>, Requantize, OutputTask<ForCodes, ForValues>,
          Combine};
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_STAGES_H_
