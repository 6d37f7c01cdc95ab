// Products of packed weights with a few quantised tokens, row by row: codes lie in vectors as they
// do in memory, and what is added across a vector is added once for a row.
//
// `Along` is one instruction set:
//   kBlocks           blocks of a row in a vector, of which each has two dwords: a step
//   kTotals           totals of rows and tokens that are in registers at once
//   Sums              float vector: of half a block in each lane
//   Token, Row        a token's step, prepared, and a row's, decoded
//   Prepare(blocks), Decode(codes, scales)      kBlocks of them
//   Zero(), Add(sums, row, token)
//   StoreTotals(sums, first, to)                of kGroup rows, or added to what is there
//   AnyNan(scales, count)

#ifndef JAX_NVFP4_MOE_CPU_ALONG_H_
#define JAX_NVFP4_MOE_CPU_ALONG_H_

#include "rows.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kGroup = 4;           // rows whose sums are added up together
constexpr int64_t kAhead = 2 * kGroup;  // rows from those that are multiplied to those fetched

template <class Along, int kCount>
INLINE void PrepareTokens(const Codes* const* tokens, int64_t from, int64_t count,
                          typename Along::Token* to) {
  constexpr int64_t kBlocks = Along::kBlocks;
  const int64_t whole = count / kBlocks, rest = count % kBlocks;
  for (int64_t t = 0; t < kCount; ++t) {
    const Codes* const blocks = tokens[t] + from;
    for (int64_t step = 0; step < whole; ++step) {
      to[step * kCount + t] = Along::Prepare(blocks + step * kBlocks);
    }
    if (rest == 0) continue;
    Codes last[kBlocks];  // the row's last, of which some were there before, or too few
    for (int64_t b = 0; b < kBlocks; ++b) {
      const int64_t block = whole > 0 ? count - kBlocks + b : b;
      last[b] = blocks[block < count ? block : 0];
      if (block >= whole * kBlocks && block < count) continue;
      memset(last[b].shifted, 12, sizeof last[b].shifted);
      last[b].scale = 0;
    }
    to[whole * kCount + t] = Along::Prepare(last);
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

  INLINE void CopyScales(const Rows& rows, int64_t row, int64_t from, int64_t count,
                         Scratch* scratch) {
    for (int64_t i = 0; i < kGroup; ++i) {
      scales[i] = RowScales(rows, rows.Stored(row + i), from, count, scratch->row_scales[i]);
    }
  }

  // Into the second cache: what is to come has no place in the first.
  template <int64_t kBlocks>
  INLINE void Fetch(int64_t i, int64_t step) const {
    constexpr int64_t kSteps = 64 / (kBlocks * kBlock / 2);  // in a line of codes
    if (step % kSteps == 0) __builtin_prefetch(codes[i] + step / kSteps * 64, 0, 2);
    if (step % (8 * kSteps) == i) __builtin_prefetch(scales[i] + step * kBlocks, 0, 2);
  }
};

// Sums of some rows of a group with all tokens.
template <class Along, int kRows, int kCount>
INLINE void MultiplyGroup(const Group& group, const Group& ahead, int64_t first, int64_t count,
                          const typename Along::Token* tokens, typename Along::Sums (*to)[kGroup]) {
  constexpr int64_t kBlocks = Along::kBlocks, kBytes = kBlocks * kBlock / 2;
  const int64_t whole = count / kBlocks, rest = count % kBlocks;
  typename Along::Sums total[kRows][kCount];
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kCount; ++t) total[i][t] = Along::Zero();
  }
  const auto add = [&](int i, int64_t step, const uint8_t* codes, const uint8_t* scales)
                       INLINE_LAMBDA {
                         const typename Along::Row row = Along::Decode(codes, scales);
                         for (int t = 0; t < kCount; ++t) {
                           total[i][t] = Along::Add(total[i][t], row, tokens[step * kCount + t]);
                         }
                       };
  for (int64_t step = 0; step < whole; ++step) {
    for (int i = 0; i < kRows; ++i) {
      ahead.Fetch<kBlocks>(first + i, step);
      add(i, step, group.codes[first + i] + step * kBytes,
          group.scales[first + i] + step * kBlocks);
    }
  }
  if (rest != 0 && whole > 0) {
    for (int i = 0; i < kRows; ++i) {
      add(i, whole, group.codes[first + i] + count * (kBlock / 2) - kBytes,
          group.scales[first + i] + count - kBlocks);
    }
  } else if (rest != 0) {  // not to read beyond the last row
    for (int i = 0; i < kRows; ++i) {
      uint8_t codes[kBytes] = {}, scales[kBlocks] = {};
      memcpy(codes, group.codes[first + i], rest * (kBlock / 2));
      memcpy(scales, group.scales[first + i], rest);
      add(i, whole, codes, scales);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kCount; ++t) to[t][first + i] = total[i][t];
  }
}

// As Multiply (products.h), for kCount tokens.
template <class Along, int kCount>
void MultiplyAlong(const Rows& rows, const Codes* const* tokens, float* sums, int64_t stride,
                   Scratch* scratch) {
  constexpr int kAtOnce = Along::kTotals / kCount;
  constexpr int kRows = kAtOnce >= 4 ? 4 : kAtOnce >= 2 ? 2 : 1;
  auto* const prepared = reinterpret_cast<typename Along::Token*>(scratch->blocks);
  static_assert(kFew * kDepth / Along::kBlocks * sizeof *prepared <= sizeof scratch->blocks);
  const int64_t all = rows.matrix->columns / kBlock;
  for (int64_t from = 0; from < all; from += kDepth) {
    const int64_t count = all - from < kDepth ? all - from : kDepth;
    PrepareTokens<Along, kCount>(tokens, from, count, prepared);
    Group group(rows, 0, from), next(rows, kGroup, from), ahead = next;
    for (int64_t row = 0; row < rows.count(); row += kGroup) {
      if (row + kAhead < rows.count()) ahead.Advance(rows, row + kAhead, from);
      if (rows.matrix->swizzled) group.CopyScales(rows, row, from, count, scratch);
      typename Along::Sums total[kCount][kGroup];
      for (int64_t first = 0; first < kGroup; first += kRows) {
        MultiplyGroup<Along, kRows, kCount>(group, ahead, first, count, prepared, total);
      }
      for (int t = 0; t < kCount; ++t) {
        Along::StoreTotals(total[t], from == 0, sums + t * stride + row);
      }
      for (int64_t i = 0; i < kGroup; ++i) {  // Decode knows no NaN
        if (__builtin_expect(!Along::AnyNan(group.scales[i], count), 1)) continue;
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
