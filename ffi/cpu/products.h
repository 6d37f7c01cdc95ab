// Products of packed weights with blocks of activations. Rows of weights lie side by side in the
// lanes of a vector, so that no sum is taken across it.
//
// An `Engine` is one instruction set and one kind of activation:
//   kLanes, kVectors  rows in a vector; vectors of rows that Multiply keeps sums of at once
//   Block             E2m1Block, Fp32Block or Bf16Block
//   Packed            vector of kLanes dwords: 8 codes of each row
//   Sums              float vector of kLanes
//   Weights           a block of kLanes rows, decoded; what a panel is made of
//   Operand           a block of one token, in every lane
//   Transpose(rows, offset, packed)   4 blocks of each row, from byte `offset` on
//   DecodeScales(rows, count, to)     [count, kLanes] floats, times 2**-8
//   Unpack(packed, scales), Broadcast(block), Add(sums, weights, operand), Zero, Load, Store
//   kGemv            has what gemv.h takes, which is faster for few tokens
//   kTiles            has MultiplyByTiles, which is faster beyond kTilesBeyond tokens
//
// Few tokens (up to kFew): weights are decoded in registers, and memory bandwidth is the limit.
// Many tokens: a panel of decoded weights, small enough for the fastest cache, is multiplied with
// one token after another.

#ifndef JAX_NVFP4_MOE_CPU_PRODUCTS_H_
#define JAX_NVFP4_MOE_CPU_PRODUCTS_H_

#include <cstdint>
#include <cstring>

#include "gemv.h"
#include "prefetch.h"
#include "rows.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kStep = 4;  // blocks that are transposed together

// Rows `row` .. `row + kLanes - 1`, from block `from` on.
template <class Engine>
struct Lanes {
  const uint8_t* codes[Engine::kLanes];
  const uint8_t* scales[Engine::kLanes];

  OUTLINE Lanes(const Rows& rows, int64_t row, int64_t from, int64_t count, Scratch* scratch) {
    for (int64_t lane = 0; lane < Engine::kLanes; ++lane) {
      const int64_t stored = rows.Stored(row + lane);
      codes[lane] = rows.Codes(stored, from);
      scales[lane] = RowScales(rows, stored, from, count, scratch->row_scales[lane]);
    }
  }

  // Calls `use(b, packed)` for each of `count` blocks.
  template <class Use>
  INLINE void ForEachBlock(int64_t count, const Use& use) const {
    typename Engine::Packed packed[2 * kStep];
    int64_t b = 0;
    for (; b + kStep <= count; b += kStep) {
      Engine::Transpose(codes, b * (kBlock / 2), packed);
      for (int64_t i = 0; i < kStep; ++i) use(b + i, packed + 2 * i);
    }
    if (b == count) return;
    uint8_t copies[Engine::kLanes][kStep * kBlock / 2] = {};  // not to read beyond the last row
    const uint8_t* rows[Engine::kLanes];
    for (int64_t lane = 0; lane < Engine::kLanes; ++lane) {
      memcpy(copies[lane], codes[lane] + b * (kBlock / 2), (count - b) * (kBlock / 2));
      rows[lane] = copies[lane];
    }
    Engine::Transpose(rows, 0, packed);
    for (int64_t i = 0; b + i < count; ++i) use(b + i, packed + 2 * i);
  }
};

// ------------------------------------------------------------------------------------- few tokens

template <class Engine>
using NextLanes = RowPrefetcher<Engine::kLanes, 1, kFirstCache>;

// Adds the products of some rows with `kCount` tokens, whose blocks alternate, to their sums.
template <class Engine, int kCount>
INLINE void MultiplyLanes(const Lanes<Engine>& lanes, const float* scales,
                          const typename Engine::Block* blocks, int64_t count, bool first,
                          float* sums, int64_t stride, const NextLanes<Engine>& next) {
  typename Engine::Sums total[kCount];
  for (int t = 0; t < kCount; ++t) {
    total[t] = first ? Engine::Zero() : Engine::Load(sums + t * stride);
  }
  lanes.ForEachBlock(count, [&](int64_t b, const typename Engine::Packed* packed) INLINE_LAMBDA {
    next.Fetch(b);
    const typename Engine::Weights w = Engine::Unpack(packed, scales + b * Engine::kLanes);
    for (int t = 0; t < kCount; ++t) {
      total[t] = Engine::Add(total[t], w, Engine::Broadcast(blocks[b * kCount + t]));
    }
  });
  for (int t = 0; t < kCount; ++t) Engine::Store(sums + t * stride, total[t]);
}

template <class Engine, int kCount>
void MultiplyFew(const Rows& rows, const typename Engine::Block* const* tokens, float* sums,
                 int64_t stride, Scratch* scratch) {
  using Block = typename Engine::Block;
  const int64_t all = rows.matrix->columns / kBlock;
  for (int64_t from = 0; from < all; from += kDepth) {
    const int64_t count = all - from < kDepth ? all - from : kDepth;
    NextLanes<Engine>(rows, 0, from).FetchAll(count);
    const Block* blocks = tokens[0] + from;
    if (kCount > 1) {
      Block* const copies = reinterpret_cast<Block*>(scratch->blocks);
      for (int64_t b = 0; b < count; ++b) {
        for (int t = 0; t < kCount; ++t) copies[b * kCount + t] = tokens[t][from + b];
      }
      blocks = copies;
    }
    for (int64_t row = 0; row < rows.count(); row += Engine::kLanes) {
      const Lanes<Engine> lanes(rows, row, from, count, scratch);
      Engine::DecodeScales(lanes.scales, count, scratch->scales);
      const int64_t below = row + Engine::kLanes < rows.count() ? row + Engine::kLanes : row;
      MultiplyLanes<Engine, kCount>(lanes, scratch->scales, blocks, count, from == 0, sums + row,
                                    stride, NextLanes<Engine>(rows, below, from));
    }
  }
}

// ------------------------------------------------------------------------------------- many tokens

// Adds the products of a panel of `kVectors` times kLanes rows with one token to its sums.
template <class Engine, int kVectors>
INLINE void MultiplyPanel(const typename Engine::Weights* panel,
                          const typename Engine::Block* blocks, int64_t count, bool first,
                          float* sums) {
  typename Engine::Sums total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    total[v] = first ? Engine::Zero() : Engine::Load(sums + v * Engine::kLanes);
  }
  for (int64_t b = 0; b < count; ++b) {
    const typename Engine::Operand x = Engine::Broadcast(blocks[b]);
    for (int v = 0; v < kVectors; ++v) {
      total[v] = Engine::Add(total[v], panel[b * kVectors + v], x);
    }
  }
  for (int v = 0; v < kVectors; ++v) Engine::Store(sums + v * Engine::kLanes, total[v]);
}

// A chunk of blocks of many tokens.
template <class Engine>
struct Chunk {
  const typename Engine::Block* const* tokens;
  int64_t num_tokens;
  int64_t from, count;
  bool last;  // the tokens end with this chunk

  INLINE void Gather(typename Engine::Block* to) const {
    for (int64_t t = 0; t < num_tokens; ++t) {
      memcpy(to + t * count, tokens[t] + from, count * sizeof *to);
    }
  }
};

// Multiplies a chunk with the rows from `row` on, and prefetches what comes next: the codes of the
// rows from `next_row` on, and during the first rows the tokens' next chunk.
template <class Engine, int kVectors>
void MultiplyChunk(const Rows& rows, int64_t row, int64_t next_row, int64_t next_from,
                   const Chunk<Engine>& chunk, float* sums, int64_t stride, Scratch* scratch) {
  using Block = typename Engine::Block;
  constexpr int64_t kRows = kVectors * Engine::kLanes;
  auto* const panel = reinterpret_cast<typename Engine::Weights*>(scratch->panel);
  static_assert(sizeof(*panel) * kVectors * kPanelBlocks <= sizeof scratch->panel);
  for (int v = 0; v < kVectors; ++v) {
    const Lanes<Engine> lanes(rows, row + v * Engine::kLanes, chunk.from, chunk.count, scratch);
    Engine::DecodeScales(lanes.scales, chunk.count, scratch->scales);
    lanes.ForEachBlock(
        chunk.count, [&](int64_t b, const typename Engine::Packed* packed) INLINE_LAMBDA {
          panel[b * kVectors + v] = Engine::Unpack(packed, scratch->scales + b * Engine::kLanes);
        });
  }
  const int64_t stride_of_codes = rows.matrix->code_stride;
  const uint8_t* const next = rows.Codes(rows.Stored(next_row), next_from);
  const Block* const blocks = reinterpret_cast<const Block*>(scratch->blocks);
  for (int64_t t = 0; t < chunk.num_tokens; ++t) {
    const int64_t begin = kRows * t / chunk.num_tokens, end = kRows * (t + 1) / chunk.num_tokens;
    PrefetchBytes(next + begin * stride_of_codes, end - begin, stride_of_codes,
                  kPanelBlocks * kBlock / 2);
    if (row == 0 && !chunk.last) {
      PrefetchBytes(chunk.tokens[t] + chunk.from + chunk.count, 1, 0,
                    kPanelBlocks * sizeof(Block));
    }
    MultiplyPanel<Engine, kVectors>(panel, blocks + t * chunk.count, chunk.count, chunk.from == 0,
                                    sums + t * stride + row);
  }
}

template <class Engine>
void MultiplyMany(const Rows& rows, const typename Engine::Block* const* tokens, int64_t num_tokens,
                  float* sums, int64_t stride, Scratch* scratch) {
  constexpr int64_t kTogether = Engine::kLanes * Engine::kVectors;
  const int64_t all = rows.matrix->columns / kBlock;
  for (int64_t from = 0; from < all; from += kPanelBlocks) {
    const int64_t count = all - from < kPanelBlocks ? all - from : kPanelBlocks;
    const Chunk<Engine> chunk = {tokens, num_tokens, from, count, from + count == all};
    chunk.Gather(reinterpret_cast<typename Engine::Block*>(scratch->blocks));
    for (int64_t row = 0; row < rows.count();) {
      const bool whole = row + kTogether <= rows.count();
      const int64_t below = row + (whole ? kTogether : Engine::kLanes);
      const bool more = below < rows.count();
      const auto multiply =
          whole ? MultiplyChunk<Engine, Engine::kVectors> : MultiplyChunk<Engine, 1>;
      multiply(rows, row, more ? below : 0, more || chunk.last ? from : from + count, chunk, sums,
               stride, scratch);
      row = below;
    }
  }
}

// ------------------------------------------------------------------------------------- any number

// sums[t * stride + r] = the product of row r with token t's blocks, without global scales.
template <class Engine>
void Multiply(const Rows& rows, const typename Engine::Block* const* tokens, int64_t num_tokens,
              float* sums, int64_t stride, Scratch* scratch) {
  const auto few = [&](auto count) INLINE_LAMBDA {
    if constexpr (Engine::kGemv) {
      if (rows.matrix->columns >= Engine::kLanes * kBlock) {  // else no row fills a vector
        return MultiplyGemv<Engine, count>(rows, tokens, sums, stride, scratch);
      }
    }
    MultiplyFew<Engine, count>(rows, tokens, sums, stride, scratch);
  };
  if (WithConstant<kFew>(num_tokens, few)) return;
  MultiplyMany<Engine>(rows, tokens, num_tokens, sums, stride, scratch);
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_PRODUCTS_H_
