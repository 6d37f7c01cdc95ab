// Rows of packed weights, as tasks multiply them, and the scratch memory of a thread.

#ifndef JAX_NVFP4_MOE_CPU_ROWS_H_
#define JAX_NVFP4_MOE_CPU_ROWS_H_

#include <cstdint>
#include <cstring>

#include "floats.h"
#include "layer.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kDepth = 128;       // the most blocks of a row that are multiplied at once
constexpr int64_t kPanelBlocks = 16;  // of a panel (products.h)
constexpr int64_t kMaxLanes = 16;

// The rows that a task multiplies: of one expert's matrix, in one run or two (gate and up).
struct Rows {
  const Matrix* matrix;
  int64_t expert;
  int64_t first[2];
  int64_t runs;
  int64_t length;  // of each run, a multiple of 16

  int64_t count() const { return runs * length; }

  // The codes and the scales of the row stored at `stored`, from block `from` on.
  INLINE const uint8_t* Codes(int64_t stored, int64_t from) const {
    const int64_t place = expert * matrix->stored_rows + stored;
    return matrix->codes + place * matrix->code_stride + from * (kBlock / 2);
  }
  INLINE const uint8_t* Scales(int64_t stored, int64_t from) const {  // not for swizzled ones
    const int64_t place = expert * matrix->stored_rows + stored;
    return matrix->scales + place * matrix->scale_stride + from;
  }

  INLINE int64_t Stored(int64_t row) const {
    const int64_t run = row >= length;
    const int64_t logical = first[run] + row - run * length;
    return matrix->order == nullptr ? logical : matrix->order[logical];
  }
};

struct Scratch {
  float sums[kTaskTokens * kMostRows];
  float scales[kMaxLanes * kDepth];
  uint8_t row_scales[kMaxLanes][kDepth];
  alignas(64) uint8_t blocks[kTaskTokens * kPanelBlocks * sizeof(Fp32Block)];
  alignas(64) uint8_t panel[512 << 10];
};
static_assert(kFew * kDepth <= kTaskTokens * kPanelBlocks);
static_assert(sizeof(Scratch) <= kScratchBytes);

template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
};

// Calls `use` with the number as a Constant, if it is from 1 to kMost; returns whether it is.
template <int kMost, class Use>
INLINE bool WithConstant(int64_t number, const Use& use) {
  if (number == kMost) {
    use(Constant<kMost>());
    return true;
  }
  if constexpr (kMost > 1) return WithConstant<kMost - 1>(number, use);
  return false;
}

// `count` scales of a row, from block `from` on: in place, or copied from their tiles.
INLINE const uint8_t* RowScales(const Rows& rows, int64_t stored, int64_t from, int64_t count,
                                uint8_t* copy) {
  const Matrix& m = *rows.matrix;
  if (!m.swizzled) return rows.Scales(stored, from);
  const uint8_t* const tiles =
      rows.Scales(stored / 128 * 128, 0) + stored % 32 * 16 + stored % 128 / 32 * 4;
  for (int64_t i = 0; i < count; ++i) copy[i] = tiles[(from + i) / 4 * 512 + (from + i) % 4];
  return copy;
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_ROWS_H_
