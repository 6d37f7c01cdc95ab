// Products of packed weights with a few quantised tokens, row by row: blocks lie in the lanes of a
// vector as they do in memory, and what is added across it is added once for a row.
//
// Of an `Engine` (products.h) this takes, beside Zero and Add:
//   kTotals                  totals of rows and tokens that are in registers at once
//   Gather(blocks)           kLanes blocks of a token, one in each lane: an Operand
//   Decode(codes, scales)    as many of a row: Weights
//   StoreTotals(sums, first, to)    of kGroup rows, or added to what is there
//   AnyNan(scales, count)

#ifndef JAX_NVFP4_MOE_CPU_ALONG_H_
#define JAX_NVFP4_MOE_CPU_ALONG_H_

#include "rows.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kGroup = 4;           // rows whose sums are added up together
constexpr int64_t kAhead = 2 * kGroup;  // rows from those that are multiplied to those fetched

// Steps of kLanes blocks. The last one ends where the row does, and of the blocks that were there
// before, in the step before or the chunk before, its tokens have zeros.
template <class Engine, int kCount>
INLINE void GatherTokens(const Codes* const* tokens, int64_t from, int64_t count,
                         typename Engine::Operand* to) {
  constexpr int64_t kLanes = Engine::kLanes;
  const int64_t whole = count / kLanes;
  for (int64_t t = 0; t < kCount; ++t) {
    const Codes* const blocks = tokens[t] + from;
    for (int64_t step = 0; step < whole; ++step) {
      to[step * kCount + t] = Engine::Gather(blocks + step * kLanes);
    }
    if (count % kLanes == 0) continue;
    Codes last[kLanes] = {};
    for (int64_t block = whole * kLanes; block < count; ++block) {
      last[block - count + kLanes] = blocks[block];
    }
    to[whole * kCount + t] = Engine::Gather(last);
  }
}

// Where some rows' codes and scales are.
struct Group {
  const uint8_t* codes[kGroup];
  const uint8_t* scales[kGroup];

  INLINE Group(const Rows& rows, int64_t row, int64_t from) {
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t stored = rows.Stored(row + i);
      codes[i] = rows.Codes(stored, from);
      scales[i] = rows.Scales(stored, from);
    }
  }

  // From rows `row - kGroup` to `row`, of which most are just as far in memory.
  INLINE void Advance(const Rows& rows, int64_t row, int64_t from) {
    if (rows.matrix->order != nullptr || row % rows.length == 0) {
      *this = Group(rows, row, from);
      return;
    }
    for (int64_t i = 0; i < kGroup; ++i) {
      codes[i] += kGroup * rows.matrix->code_stride;
      scales[i] += kGroup * rows.matrix->scale_stride;
    }
  }

  // Where they are swizzled, from `back` blocks before `from` on.
  INLINE void CopyScales(const Rows& rows, int64_t row, int64_t from, int64_t count, int64_t back,
                         Scratch* scratch) {
    for (int64_t i = 0; i < kGroup; ++i) {
      scales[i] = back + RowScales(rows, rows.Stored(row + i), from - back, count + back,
                                   scratch->row_scales[i]);
    }
  }

  // Into the second cache: what is to come has no place in the first.
  template <int64_t kLanes>
  INLINE void Fetch(int64_t i, int64_t step) const {
    constexpr int64_t kBytes = kLanes * kBlock / 2;
    for (int64_t line = 0; line < kBytes; line += 64) {
      __builtin_prefetch(codes[i] + step * kBytes + line, 0, 2);
    }
    if (step % (64 / kLanes) == i) __builtin_prefetch(scales[i] + step * kLanes, 0, 2);
  }
};

// Sums of some rows of a group with all tokens.
template <class Engine, int kRows, int kCount>
INLINE void MultiplyGroup(const Group& group, const Group& ahead, int64_t first, int64_t count,
                          const typename Engine::Operand* tokens,
                          typename Engine::Sums (*to)[kGroup]) {
  constexpr int64_t kLanes = Engine::kLanes;
  typename Engine::Sums total[kRows][kCount];
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kCount; ++t) total[i][t] = Engine::Zero();
  }
  const auto add = [&](int i, int64_t step, int64_t block) INLINE_LAMBDA {
    const typename Engine::Weights w = Engine::Decode(group.codes[first + i] + block * (kBlock / 2),
                                                      group.scales[first + i] + block);
    for (int t = 0; t < kCount; ++t) {
      total[i][t] = Engine::Add(total[i][t], w, tokens[step * kCount + t]);
    }
  };
  const int64_t whole = count / kLanes;
  for (int64_t step = 0; step < whole; ++step) {
    for (int i = 0; i < kRows; ++i) {
      ahead.Fetch<kLanes>(first + i, step);
      add(i, step, step * kLanes);
    }
  }
  if (count % kLanes != 0) {
    for (int i = 0; i < kRows; ++i) add(i, whole, count - kLanes);
  }
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kCount; ++t) to[t][first + i] = total[i][t];
  }
}

// As Multiply (products.h), for kCount tokens and rows of at least kLanes blocks.
template <class Engine, int kCount>
void MultiplyAlong(const Rows& rows, const Codes* const* tokens, float* sums, int64_t stride,
                   Scratch* scratch) {
  constexpr int64_t kLanes = Engine::kLanes;
  constexpr int kAtOnce = Engine::kTotals / kCount;
  constexpr int kRows = kAtOnce >= 4 ? 4 : kAtOnce >= 2 ? 2 : 1;
  auto* const gathered = reinterpret_cast<typename Engine::Operand*>(scratch->blocks);
  static_assert(kFew * kDepth / kLanes * sizeof *gathered <= sizeof scratch->blocks);
  const int64_t all = rows.matrix->columns / kBlock;
  for (int64_t from = 0; from < all; from += kDepth) {
    const int64_t count = all - from < kDepth ? all - from : kDepth;
    const int64_t back = count < kLanes ? kLanes - count : 0;
    GatherTokens<Engine, kCount>(tokens, from, count, gathered);
    Group group(rows, 0, from), next(rows, kGroup, from), ahead = next;
    for (int64_t row = 0; row < rows.count(); row += kGroup) {
      if (row + kAhead < rows.count()) ahead.Advance(rows, row + kAhead, from);
      if (rows.matrix->swizzled) group.CopyScales(rows, row, from, count, back, scratch);
      typename Engine::Sums total[kCount][kGroup];
      for (int64_t first = 0; first < kGroup; first += kRows) {
        MultiplyGroup<Engine, kRows, kCount>(group, ahead, first, count, gathered, total);
      }
      for (int t = 0; t < kCount; ++t) {
        Engine::StoreTotals(total[t], from == 0, sums + t * stride + row);
      }
      for (int64_t i = 0; i < kGroup; ++i) {  // Decode knows no NaN
        if (__builtin_expect(!Engine::AnyNan(group.scales[i], count), 1)) continue;
        for (int t = 0; t < kCount; ++t) sums[t * stride + row + i] = __builtin_nanf("");
      }
      group = next;
      next = ahead;
    }
  }
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_ALONG_H_
