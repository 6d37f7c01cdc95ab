// Products of packed weights with blocks of activations: a few rows of weights side by side in the
// lanes of a vector, so that their sums never have to be added across it.
//
// An `Engine` is one instruction set and one kind of activation:
//   kLanes      rows in a vector
//   Block       Codes or Values
//   Weights     a block of weights of kLanes rows, decoded
//   Sums        float vector of kLanes
//   Unpack(panel), Zero(), LoadSums(p), StoreSums(p, v), Add(sums, weights, block)
//   Transpose(rows, ...), DecodeScales(rows, ...)
// Weights are read once for all of a task's tokens, and lie in a *panel* then: packed still, but
// the 8 codes (4 bytes) that are each row's next beside each other.

#ifndef JAX_NVFP4_MOE_CPU_PRODUCTS_H_
#define JAX_NVFP4_MOE_CPU_PRODUCTS_H_

#include <cstdint>
#include <cstring>

#include "floats.h"
#include "layer.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kTokens = 8;     // whose sums are in registers at once
constexpr int64_t kDepth = 128;    // blocks of a panel: what is used again stays in the cache
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kPanelRows = 128;  // of all panels that are kept at once

// What a task multiplies: rows of one expert's matrix, in up to two runs (gate and up).
struct Rows {
  const Matrix* matrix;
  int64_t expert;
  int64_t first[2];
  int64_t runs;
  int64_t length;  // of each run, a multiple of 16

  int64_t count() const { return runs * length; }

  INLINE int64_t Stored(int64_t row) const {
    const int64_t run = row >= length;
    const int64_t logical = first[run] + row - run * length;
    return matrix->order == nullptr ? logical : matrix->order[logical];
  }
};

struct Scratch {
  float sums[kTaskTokens * 2 * kOutputChunk];
  uint32_t codes[kPanelRows * kDepth * 2];
  float scales[kPanelRows * kDepth];
  uint8_t row_scales[kMaxLanes][kDepth];
  alignas(64) uint8_t blocks[kTaskTokens * kDepth * sizeof(Values)];
};
static_assert(sizeof(Scratch) <= kScratchBytes);

// `count` scales of a row, from block `from` on: where they are, or a copy of them.
INLINE const uint8_t* RowScales(const Rows& rows, int64_t stored, int64_t from, int64_t count,
                                uint8_t* copy) {
  const Matrix& m = *rows.matrix;
  const uint8_t* base = m.scales + rows.expert * m.stored_rows * m.scale_stride;
  if (!m.swizzled) return base + stored * m.scale_stride + from;
  const uint8_t* tiles = base + stored / 128 * 128 * m.scale_stride + stored % 32 * 16 +
                         stored % 128 / 32 * 4;
  for (int64_t i = 0; i < count; ++i) copy[i] = tiles[(from + i) / 4 * 512 + (from + i) % 4];
  return copy;
}

// Rows `row` .. `row + kLanes - 1` and their blocks `from` .. `from + count - 1` into a panel.
template <class Engine>
INLINE void LoadPanel(const Rows& rows, int64_t row, int64_t from, int64_t count, uint32_t* codes,
                      float* scales, Scratch* scratch) {
  const Matrix& m = *rows.matrix;
  const uint8_t* code_rows[Engine::kLanes];
  const uint8_t* scale_rows[Engine::kLanes];
  for (int64_t lane = 0; lane < Engine::kLanes; ++lane) {
    const int64_t stored = rows.Stored(row + lane);
    code_rows[lane] =
        m.codes + (rows.expert * m.stored_rows + stored) * m.code_stride + from * (kBlock / 2);
    scale_rows[lane] = RowScales(rows, stored, from, count, scratch->row_scales[lane]);
  }
  Engine::Transpose(code_rows, count, codes);
  Engine::DecodeScales(scale_rows, count, scales);
}

// Adds the products of a panel with `kCount` tokens to their sums. Meanwhile `next`, a panel's
// codes row by row, is fetched into the cache.
template <class Engine, int kCount>
INLINE void MultiplyPanel(const uint32_t* codes, const float* scales,
                          const typename Engine::Block* blocks, int64_t count, bool first,
                          float* sums, int64_t stride, const uint8_t* next, int64_t next_stride) {
  constexpr int64_t kLanes = Engine::kLanes;
  typename Engine::Sums total[kCount];
  for (int t = 0; t < kCount; ++t) {
    total[t] = first ? Engine::Zero() : Engine::LoadSums(sums + t * stride);
  }
  const int64_t lines = count * kLanes * 8 / 64;
  const int64_t lines_in_row = count / 8;
  int64_t line = 0, in_row = 0;
  for (int64_t b = 0; b < count; ++b) {
    if (next != nullptr) {
      for (int64_t i = 0; i < kLanes / 8 && line < lines; ++i, ++line) {
        __builtin_prefetch(next + in_row * 64, 0, 3);
        if (++in_row >= lines_in_row) in_row = 0, next += next_stride;
      }
    }
    const typename Engine::Weights w = Engine::Unpack(codes + b * 2 * kLanes, scales + b * kLanes);
    for (int t = 0; t < kCount; ++t) total[t] = Engine::Add(total[t], w, blocks[b * kCount + t]);
  }
  for (int t = 0; t < kCount; ++t) Engine::StoreSums(sums + t * stride, total[t]);
}

template <class Engine>
void MultiplyPanel(int64_t tokens, const uint32_t* codes, const float* scales,
                   const typename Engine::Block* blocks, int64_t count, bool first, float* sums,
                   int64_t stride, const uint8_t* next, int64_t next_stride) {
#define CASE(n)                                                                              \
  case n:                                                                                    \
    return MultiplyPanel<Engine, n>(codes, scales, blocks, count, first, sums, stride, next, \
                                    next_stride)
  switch (tokens) {
    CASE(1);
    CASE(2);
    CASE(3);
    CASE(4);
    CASE(5);
    CASE(6);
    CASE(7);
    CASE(8);
  }
#undef CASE
}

// Blocks `from` .. of some tokens, those of each block beside each other.
template <class Block>
INLINE void Interleave(const Block* const* tokens, int64_t num_tokens, int64_t from, int64_t count,
                       Block* to) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t b = 0; b < count; ++b) to[b * num_tokens + t] = tokens[t][from + b];
  }
}

// sums[t * stride + r] = the product of row r with token t's blocks, without global scales.
template <class Engine>
void Multiply(const Rows& rows, const typename Engine::Block* const* tokens, int64_t num_tokens,
              float* sums, int64_t stride, Scratch* scratch) {
  using Block = typename Engine::Block;
  constexpr int64_t kLanes = Engine::kLanes;
  const Matrix& m = *rows.matrix;
  const int64_t blocks = m.columns / kBlock;
  // With few tokens a panel is used once, while it is in the fastest cache.
  const int64_t rows_at_once = num_tokens <= kTokens ? kLanes : kPanelRows;
  Block* const interleaved = reinterpret_cast<Block*>(scratch->blocks);
  for (int64_t from = 0; from < blocks; from += kDepth) {
    const int64_t count = blocks - from < kDepth ? blocks - from : kDepth;
    for (int64_t t = 0; num_tokens > 1 && t < num_tokens; t += kTokens) {
      const int64_t here = num_tokens - t < kTokens ? num_tokens - t : kTokens;
      Interleave(tokens + t, here, from, count, interleaved + t * count);
    }
    const Block* const start = num_tokens == 1 ? tokens[0] + from : interleaved;
    for (int64_t top = 0; top < rows.count(); top += rows_at_once) {
      const int64_t end = top + rows_at_once < rows.count() ? top + rows_at_once : rows.count();
      for (int64_t row = top; row < end; row += kLanes) {
        const int64_t at = (row - top) * count;
        LoadPanel<Engine>(rows, row, from, count, scratch->codes + 2 * at, scratch->scales + at,
                          scratch);
      }
      const uint8_t* next = nullptr;
      if (num_tokens <= kTokens && m.order == nullptr && end < rows.count()) {
        next = m.codes + (rows.expert * m.stored_rows + rows.Stored(end)) * m.code_stride +
               from * (kBlock / 2);
      }
      for (int64_t t = 0; t < num_tokens; t += kTokens) {
        const int64_t here = num_tokens - t < kTokens ? num_tokens - t : kTokens;
        for (int64_t row = top; row < end; row += kLanes) {
          const int64_t at = (row - top) * count;
          MultiplyPanel<Engine>(here, scratch->codes + 2 * at, scratch->scales + at,
                                start + t * count, count, from == 0, sums + t * stride + row, stride,
                                next, m.code_stride);
        }
      }
    }
  }
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_PRODUCTS_H_
