// The level for AMX-BF16: tiles where an expert has many tokens, AVX-512 where it has few.
//
// A tile holds 16 rows of 64 bytes. Weights are the left side, 16 rows by 32 columns, tokens the
// right one, 16 pairs of columns by 16 tokens, both in bfloat16, where code times scale is exact;
// sums are float. Weights are decoded a tile at a time, while the tile before is multiplied, into
// the fastest cache. As few tiles as can be are in use: where the core is shared with another
// thread, each one more was measured to slow all products down (docs/cpu.md).

#include "engine_x86.h"
#include "level.h"
#include "prefetch.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kTile = 16;                     // rows of a tile
constexpr int64_t kTileBytes = 64;                // of a row
constexpr int64_t kTileBlocks = 2;                // that a product of tiles adds over
constexpr int64_t kSteps = kDepth / kTileBlocks;  // products of tiles, one after another
constexpr int64_t kTokenTiles = kTaskTokens / kTile;
constexpr int64_t kRecent = 4;  // tiles of weights that are kept
constexpr int64_t kCodeBytes = kDepth * kBlock / 2;

using Tile = uint16_t[kTile][kTileBytes / sizeof(uint16_t)];

struct Tiles {
  alignas(64) Tile tokens[kTokenTiles][kSteps];
  alignas(64) Tile weights[kRecent];
  alignas(64) float sums[kTokenTiles][kTile][kTile];  // [][row][token]
  alignas(64) uint16_t offsets[kTile][kDepth];        // of 16 rows' blocks: bytes into kDecodeTable
  alignas(64) uint8_t codes[kTile][kCodeBytes];       // of 16 rows, if they are not neighbours
};
static_assert(sizeof(Tiles) <= sizeof(Scratch::panel));

// Every tile at its full size, until the end of the scope.
class TileConfiguration {
 public:
  INLINE TileConfiguration() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = kTileBytes;
      configuration.rows[tile] = kTile;
    }
    _tile_loadconfig(&configuration);
  }
  INLINE ~TileConfiguration() { _tile_release(); }
};

// ------------------------------------------------------------------------------------- weights

// The value of each code at each scale, in bfloat16: exact, with at most six significant bits. The
// 16 values are there twice, because vpermw reads five bits of an index, and the fifth is of
// another code.
struct DecodeTable {
  uint16_t of[256][2][16];

  constexpr DecodeTable() : of() {
    constexpr float kMagnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    for (int scale = 0; scale < 256; ++scale) {
      const int exponent = scale >> 3 & 15, mantissa = scale & 7;
      float value = exponent == 0 ? 0x1p-9f * mantissa : 0x1p-10f * (8 + mantissa);
      for (int i = 0; i < exponent; ++i) value *= 2;
      for (int code = 0; code < 16; ++code) {
        const float exact = value * kMagnitudes[code & 7];
        const bool negative = (scale >> 7) != (code >> 3);
        const uint32_t bits = __builtin_bit_cast(uint32_t, negative ? -exact : exact);
        of[scale][0][code] = of[scale][1][code] = (scale & 127) == 127 ? 0x7FC0 : bits >> 16;
      }
    }
  }
};
alignas(64) constexpr DecodeTable kDecodeTable;

// 16 rows of weights, from block `from` on.
struct Source {
  const uint8_t* codes;
  int64_t stride;
  const uint16_t (*offsets)[kDepth];

  INLINE Source(const Rows& rows, int64_t row, int64_t from, int64_t count, Scratch* scratch) {
    auto* const tiles = reinterpret_cast<Tiles*>(scratch->panel);
    const bool neighbours = rows.matrix->order == nullptr;
    codes = neighbours ? rows.Codes(rows.Stored(row), from) : tiles->codes[0];
    stride = neighbours ? rows.matrix->code_stride : kCodeBytes;
    offsets = tiles->offsets;
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t stored = rows.Stored(row + i);
      if (!neighbours) memcpy(tiles->codes[i], rows.Codes(stored, from), count * (kBlock / 2));
      const uint8_t* const scales = RowScales(rows, stored, from, count, scratch->row_scales[0]);
      for (int64_t b = 0; b < count; b += 32) {
        const __mmask32 present = count - b < 32 ? (1u << (count - b)) - 1 : ~0u;
        const __m256i bytes = _mm256_maskz_loadu_epi8(present, scales + b);
        _mm512_store_si512(tiles->offsets[i] + b,
                           _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 6));
      }
    }
  }

  // Blocks 2 * step and, unless `kHalf`, the next: the first code of each four, then the second of
  // each, and so on.
  template <bool kHalf>
  INLINE void Decode(int64_t step, Tile to) const {
    const __m512i shifts =
        _mm512_set_epi64(0x000C000C000C000C, 0x000C000C000C000C, 0x0008000800080008,
                         0x0008000800080008, 0x0004000400040004, 0x0004000400040004, 0, 0);
    const auto* const all = reinterpret_cast<const uint8_t*>(kDecodeTable.of);
    const uint8_t* four = codes + step * kBlock;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) {
      if (i % 4 == 0 && i > 0) four += 4 * stride;
      asm("" : "+r"(four));  // not to compute 16 addresses beforehand, and spill them
      const auto* const bytes = reinterpret_cast<const __m128i*>(four + i % 4 * stride);
      const __m128i packed = kHalf ? _mm_loadl_epi64(bytes) : _mm_loadu_si128(bytes);
      const __m512i index = _mm512_srlv_epi16(_mm512_broadcast_i32x4(packed), shifts);
      const uint16_t* const at = offsets[i] + step * kTileBlocks;
      const __m512i first = _mm512_permutexvar_epi16(index, _mm512_load_si512(all + at[0]));
      _mm512_store_si512(to[i], _mm512_mask_permutexvar_epi16(first, 0xF0F0F0F0, index,
                                                              _mm512_load_si512(all + at[1])));
    }
  }
};

using NextTile = RowPrefetcher<kTile, kTileBlocks, kSecondCache>;

// ------------------------------------------------------------------------------------- tokens

INLINE __m256i InBfloat16(const E2m1Block& x) {
  const __m512i doubled =
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x.doubled)));
  const __m512 value =
      _mm512_mul_ps(_mm512_cvtepi32_ps(doubled), _mm512_set1_ps(x.scale * 0x1p-7f));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(value), 16));
}

INLINE __m256i InBfloat16(const Bf16Block& x) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.value));
}

INLINE void Transpose16x16(__m512i* v) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + j + 2]);
    }
  }
  // v[4i + j] holds columns j, j + 4, j + 8 and j + 12 of rows 4i .. 4i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xEE);
    w[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    w[4 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
    w[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    w[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
  for (int i = 0; i < 16; ++i) v[i] = w[i];
}

// Where in two blocks the tokens' elements are that meet each word of a row of weights.
struct Order {
  uint16_t of[32];

  constexpr explicit Order(bool codes) : of() {
    constexpr int kPlaces[kBlock] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    for (int i = 0; i < 32; ++i) {
      const int element = i % 4 * 4 + i / 8;
      of[i] = static_cast<uint16_t>(i % 8 / 4 * kBlock + (codes ? kPlaces[element] : element));
    }
  }
};
alignas(64) constexpr Order kE2m1Order{true}, kBf16Order{false};

// Two blocks of up to 16 tokens, in the weights' order; zeros where there are none.
template <class Block>
INLINE void LoadTokens(const Block* const* tokens, int64_t num_tokens, int64_t block, bool half,
                       Tile to) {
  const __m512i order =
      _mm512_load_si512(__is_same(Block, E2m1Block) ? kE2m1Order.of : kBf16Order.of);
  __m512i v[kTile];
  for (int64_t t = 0; t < kTile; ++t) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i first = t < num_tokens ? InBfloat16(tokens[t][block]) : zero;
    const __m256i second = t < num_tokens && !half ? InBfloat16(tokens[t][block + 1]) : zero;
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    v[t] = _mm512_permutexvar_epi16(order, both);
  }
  Transpose16x16(v);
  for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to[i], v[i]);
}

// ------------------------------------------------------------------------------------- products

// Sums of a tile of rows with `kCount` tiles of tokens. `decode(step)` makes the tile of weights of
// a step two steps before it is multiplied, and it is loaded one step before: what a product waits
// for has been done long ago.
template <int kCount, class Decode>
INLINE void MultiplyTiles(int64_t steps, const Decode& decode, Tiles* tiles) {
  _tile_zero(0);
  if (kCount > 1) _tile_zero(1);
  if (kCount > 2) _tile_zero(2);
  if (kCount > 3) _tile_zero(3);
  decode(0);
  decode(1);
  const auto weights = [&](int64_t step) { return tiles->weights[step % kRecent]; };
  _tile_loadd(4, weights(0), kTileBytes);
  _tile_loadd(5, tiles->tokens[0][0], kTileBytes);
  for (int64_t step = 0; step < steps; ++step) {
    decode(step + 2);
    _tile_dpbf16ps(0, 4, 5);
    if (kCount > 1) {
      _tile_loadd(5, tiles->tokens[1][step], kTileBytes);
      _tile_dpbf16ps(1, 4, 5);
    }
    if (kCount > 2) {
      _tile_loadd(5, tiles->tokens[2][step], kTileBytes);
      _tile_dpbf16ps(2, 4, 5);
    }
    if (kCount > 3) {
      _tile_loadd(5, tiles->tokens[3][step], kTileBytes);
      _tile_dpbf16ps(3, 4, 5);
    }
    if (step + 1 < steps) {
      _tile_loadd(4, weights(step + 1), kTileBytes);
      _tile_loadd(5, tiles->tokens[0][step + 1], kTileBytes);
    }
  }
  _tile_stored(0, tiles->sums[0], kTileBytes);
  if (kCount > 1) _tile_stored(1, tiles->sums[1], kTileBytes);
  if (kCount > 2) _tile_stored(2, tiles->sums[2], kTileBytes);
  if (kCount > 3) _tile_stored(3, tiles->sums[3], kTileBytes);
}

// As Multiply (products.h), for so many tiles of tokens.
template <int kCount, class Block>
void MultiplyTokenTiles(const Rows& rows, const Block* const* tokens, int64_t num_tokens,
                        float* sums, int64_t stride, Scratch* scratch) {
  auto* const tiles = reinterpret_cast<Tiles*>(scratch->panel);
  const TileConfiguration configuration;
  const int64_t all = rows.matrix->columns / kBlock;
  for (int64_t from = 0; from < all; from += kDepth) {
    const int64_t count = all - from < kDepth ? all - from : kDepth;
    const int64_t steps = (count + 1) / 2;
    const NextTile first(rows, 0, from);
    for (int64_t step = 0; step < steps; ++step) {
      first.Fetch(step);
      for (int64_t t = 0; t < kCount; ++t) {
        LoadTokens(tokens + t * kTile, num_tokens - t * kTile, from + 2 * step,
                   2 * step + 1 == count, tiles->tokens[t][step]);
      }
    }
    for (int64_t row = 0; row < rows.count(); row += kTile) {
      const Source source(rows, row, from, count, scratch);
      const NextTile below(rows, row + kTile < rows.count() ? row + kTile : row, from);
      const auto decode = [&](int64_t step) INLINE_LAMBDA {
        if (step >= steps) return;
        Tile* const to = &tiles->weights[step % kRecent];
        below.Fetch(step);
        2 * step + 1 == count ? source.Decode<true>(step, *to) : source.Decode<false>(step, *to);
      };
      MultiplyTiles<kCount>(steps, decode, tiles);
      for (int64_t t = 0; t < num_tokens; ++t) {
        if (t % kTile == 0) Transpose16x16(reinterpret_cast<__m512i*>(tiles->sums[t / kTile]));
        const __m512 sum = _mm512_load_ps(tiles->sums[t / kTile][t % kTile]);
        float* const to = sums + t * stride + row;
        _mm512_storeu_ps(to, from == 0 ? sum : _mm512_add_ps(_mm512_loadu_ps(to), sum));
      }
    }
  }
}

template <class ForFew, int64_t kFewTokens>
struct Amx : ForFew {
  static constexpr bool kTiles = true;
  static constexpr int64_t kTilesBeyond = kFewTokens;
  using Block = typename ForFew::Block;

  static void MultiplyByTiles(const Rows& rows, const Block* const* tokens, int64_t num_tokens,
                              float* sums, int64_t stride, Scratch* scratch) {
    const auto multiply = [&](auto count) INLINE_LAMBDA {
      MultiplyTokenTiles<count>(rows, tokens, num_tokens, sums, stride, scratch);
    };
    WithConstant<kTokenTiles>((num_tokens + kTile - 1) / kTile, multiply);
  }
};

}  // namespace

// Up to so many tokens AVX-512 was measured to be faster than tiles.
const Stages kAmx =
    StagesOf<Amx<E2m1Engine<Vector512>, 5>, Fp32Engine<Vector512>, Amx<Bf16Engine, 1>>();

}  // namespace jax_nvfp4_moe::cpu
