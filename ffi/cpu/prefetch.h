// Prefetching of packed rows while the rows before them are multiplied.
//
// A product takes its rows in steps of kBlocks blocks. With each step it fetches an equal share of
// the rows that come next, so that all of them have been fetched when it gets there. A cache line
// holds the codes of 8 blocks of a row, or the scales of 64.

#ifndef JAX_NVFP4_MOE_CPU_PREFETCH_H_
#define JAX_NVFP4_MOE_CPU_PREFETCH_H_

#include <cstdint>

#include "rows.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kLine = 64;                      // bytes
constexpr int64_t kLineBlocks = 8;                 // whose codes are in a line
constexpr int kFirstCache = 3, kSecondCache = 2;  // __builtin_prefetch's localities

// Fetches `bytes` of each of `count` rows.
INLINE void PrefetchBytes(const void* first, int64_t count, int64_t stride, int64_t bytes) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t byte = 0; byte < bytes; byte += kLine) {
      __builtin_prefetch(static_cast<const uint8_t*>(first) + row * stride + byte, 0, kFirstCache);
    }
  }
}

// Fetches the codes of a row that belong to a step.
template <int64_t kBlocks, int kCache>
INLINE void PrefetchCodes(const uint8_t* codes, int64_t step) {
  constexpr int64_t kSteps = kBlocks < kLineBlocks ? kLineBlocks / kBlocks : 1;  // of a line
  constexpr int64_t kBytes = kSteps * kBlocks * (kBlock / 2);
  for (int64_t line = 0; line < kBytes; line += kLine) {
    __builtin_prefetch(codes + step / kSteps * kBytes + line, 0, kCache);
  }
}

// Fetches the scales of row `row`, at the step that is this row's turn.
template <int64_t kBlocks, int kCache>
INLINE void PrefetchScales(const uint8_t* scales, int64_t row, int64_t step) {
  if (step % (kLine / kBlocks) == row) __builtin_prefetch(scales + step * kBlocks, 0, kCache);
}

// kRows rows that lie one after the other. Where rows are stored in another order, it fetches rows
// that are not needed next.
template <int64_t kRows, int64_t kBlocks, int kCache>
class RowPrefetcher {
 public:
  // Rows from `row` on, from block `from` on.
  INLINE RowPrefetcher(const Rows& rows, int64_t row, int64_t from)
      : codes_(rows.Codes(rows.Stored(row), from)),
        scales_(rows.Scales(rows.Stored(row), from)),
        code_stride_(rows.matrix->code_stride),
        scale_stride_(rows.matrix->scale_stride) {}

  INLINE void Fetch(int64_t step) const {
    constexpr int64_t kSteps = kLineBlocks / kBlocks;  // that share the rows of a line
    const uint8_t* const codes = codes_ + step % kSteps * code_stride_;
    for (int64_t row = 0; row < kRows; row += kSteps) {
      PrefetchCodes<kBlocks, kCache>(codes + row * code_stride_, step);
    }
    const int64_t row = step % (kLine / kBlocks);  // each row's scales in turn
    if (row < kRows) {
      __builtin_prefetch(scales_ + row * scale_stride_ + (step - row) * kBlocks, 0, kCache);
    }
  }

  // Fetches `count` blocks of all rows at once.
  INLINE void FetchAll(int64_t count) const {
    PrefetchBytes(codes_, kRows, code_stride_, count * (kBlock / 2));
    PrefetchBytes(scales_, kRows, scale_stride_, count);
  }

 private:
  const uint8_t* codes_;
  const uint8_t* scales_;
  int64_t code_stride_, scale_stride_;
};

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_PREFETCH_H_
