// Products of packed weights with a few quantised tokens, row by row. The lanes of a vector hold
// blocks of one row, as they lie in memory, and each row's sum across the vector is taken once.
//
// An `Engine` (products.h) provides, beside Zero and Add:
//   kTotals                  the most sums of rows and tokens that are kept in registers
//   Gather(blocks)           kLanes blocks of a token, one in each lane: an Operand
//   Decode(codes, scales)    kLanes blocks of a row, in the same order: Weights
//   StoreTotals(sums, first, to)    stores the totals of kGroup rows, or adds them to `to`
//   AnyNan(scales, count)    whether a scale is NaN

#ifndef JAX_NVFP4_MOE_CPU_GEMV_H_
#define JAX_NVFP4_MOE_CPU_GEMV_H_

#include "prefetch.h"
#include "rows.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kGroup = 4;           // rows whose totals are stored together
constexpr int64_t kAhead = 2 * kGroup;  // prefetched so many rows ahead

// Gathers tokens in steps of kLanes blocks. The last step ends where the row does, so it may repeat
// blocks of the step or chunk before; for these the tokens have zeros.
template <class Engine, int kCount>
INLINE void GatherTokens(const E2m1Block* const* tokens, int64_t from, int64_t count,
                         typename Engine::Operand* to) {
  constexpr int64_t kLanes = Engine::kLanes;
  const int64_t whole = count / kLanes;
  for (int64_t t = 0; t < kCount; ++t) {
    const E2m1Block* const blocks = tokens[t] + from;
    for (int64_t step = 0; step < whole; ++step) {
      to[step * kCount + t] = Engine::Gather(blocks + step * kLanes);
    }
    if (count % kLanes == 0) continue;
    E2m1Block last[kLanes] = {};
    for (int64_t block = whole * kLanes; block < count; ++block) {
      last[block - count + kLanes] = blocks[block];
    }
    to[whole * kCount + t] = Engine::Gather(last);
  }
}

// The codes and scales of kGroup rows.
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

  // Moves from the rows at `row - kGroup` to those at `row`; most lie kGroup rows further in
  // memory.
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

  // Copies swizzled scales, from `back` blocks before `from` on.
  INLINE void CopyScales(const Rows& rows, int64_t row, int64_t from, int64_t count, int64_t back,
                         Scratch* scratch) {
    for (int64_t i = 0; i < kGroup; ++i) {
      scales[i] = back + RowScales(rows, rows.Stored(row + i), from - back, count + back,
                                   scratch->row_scales[i]);
    }
  }

  // Fetches a step of row i into the second cache; the first has no room for rows to come.
  template <int64_t kLanes>
  INLINE void Fetch(int64_t i, int64_t step) const {
    PrefetchCodes<kLanes, kSecondCache>(codes[i], step);
    PrefetchScales<kLanes, kSecondCache>(scales[i], i, step);
  }
};

// Multiplies kRows rows of a group, from row `first` on, with all tokens.
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
void MultiplyGemv(const Rows& rows, const E2m1Block* const* tokens, float* sums, int64_t stride,
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
      for (int64_t i = 0; i < kGroup; ++i) {  // Decode makes numbers of NaNs
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

#endif  // JAX_NVFP4_MOE_CPU_GEMV_H_
