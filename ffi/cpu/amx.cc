// The level for AMX-BF16: tiles where an expert has many tokens, AVX-512 where it has few.
//
// A tile holds 16 rows of 64 bytes. Weights go into tiles of 16 pairs of columns by 16 rows, tokens
// into tiles of 16 tokens by 32 columns, both in bfloat16, where code times scale is exact; sums
// are float. Two tiles of weights meet two of tokens, so that each is loaded once for two products.

#include "engine_avx512.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {
namespace {

constexpr int64_t kTile = 16;                    // rows of a tile
constexpr int64_t kTileBytes = 64;               // of a row
constexpr int64_t kTileColumns = 32;             // that a product of tiles adds over
constexpr int64_t kTileDepth = kDepth * kBlock;  // columns at once
constexpr int64_t kRowsAtOnce = 2 * kTile;

struct Tiles {
  alignas(
      64) uint16_t weights[2][kTileDepth / 2][2 * kTile];  // [tile of rows][pair][row, even|odd]
  alignas(64) uint16_t tokens[kTaskTokens][kTileDepth];
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

// 16 rows of weights from block `from` on, in pairs of columns; zeros up to `columns`.
INLINE void LoadTiles(const Rows& rows, int64_t row, int64_t from, int64_t count, int64_t columns,
                      uint16_t (*to)[2 * kTile], Scratch* scratch) {
  const Lanes<Avx512> lanes(rows, row, from, count, scratch);
  Avx512::DecodeScales(lanes.scales, count, scratch->scales);
  lanes.ForEachBlock(count, [&](int64_t b, const __m512i* packed) INLINE_LAMBDA {
    const __m512 scale = _mm512_loadu_ps(scratch->scales + b * kTile);
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      _mm512_storeu_si512(to[b * (kBlock / 2) + pair], Pair512(packed, pair, scale));
    }
  });
  for (int64_t pair = count * (kBlock / 2); pair < columns / 2; ++pair) {
    _mm512_storeu_si512(to[pair], _mm512_setzero_si512());
  }
}

INLINE void LoadTokens(const Narrow* const* tokens, int64_t num_tokens, int64_t from, int64_t count,
                       int64_t columns, uint16_t (*to)[kTileDepth]) {
  const int64_t padded = (num_tokens + kTile - 1) / kTile * kTile;
  for (int64_t t = 0; t < padded; ++t) {
    const int64_t there = t < num_tokens ? count * kBlock : 0;
    if (there > 0) memcpy(to[t], tokens[t] + from, there * sizeof(uint16_t));
    memset(to[t] + there, 0, (columns - there) * sizeof(uint16_t));
  }
}

// Sums of 16 or 32 rows with up to 64 tokens, which have room for whole tiles.
template <int kWide>
INLINE void MultiplyTiles(const Tiles& tiles, int64_t num_tokens, int64_t columns, bool first,
                          float* sums, int64_t stride) {
  const int64_t bytes = stride * sizeof(float);
  for (int64_t t = 0; t < num_tokens; t += 2 * kTile) {
    float* const upper = sums + t * stride;
    float* const lower = upper + kTile * stride;
    const bool both = t + kTile < num_tokens;
    const uint16_t* const x0 = tiles.tokens[t];
    const uint16_t* const x1 = both ? tiles.tokens[t + kTile] : x0;
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, upper, bytes);
      if (kWide == 2) _tile_loadd(1, upper + kTile, bytes);
      if (both) _tile_loadd(2, lower, bytes);
      if (both && kWide == 2) _tile_loadd(3, lower + kTile, bytes);
    }
    for (int64_t c = 0; c < columns; c += kTileColumns) {
      _tile_loadd(4, x0 + c, kTileDepth * sizeof(uint16_t));
      _tile_loadd(6, tiles.weights[0][c / 2], kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      if (kWide == 2) {
        _tile_loadd(7, tiles.weights[1][c / 2], kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (both) {
        _tile_loadd(5, x1 + c, kTileDepth * sizeof(uint16_t));
        _tile_dpbf16ps(2, 5, 6);
        if (kWide == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, upper, bytes);
    if (kWide == 2) _tile_stored(1, upper + kTile, bytes);
    if (both) _tile_stored(2, lower, bytes);
    if (both && kWide == 2) _tile_stored(3, lower + kTile, bytes);
  }
}

// As Multiply, for more than kFew tokens.
void MultiplyByTiles(const Rows& rows, const Narrow* const* tokens, int64_t num_tokens, float* sums,
                     int64_t stride, Scratch* scratch) {
  auto* const tiles = reinterpret_cast<Tiles*>(scratch->panel);
  const TileConfiguration configuration;
  const int64_t all = rows.matrix->columns / kBlock;
  for (int64_t from = 0; from < all; from += kDepth) {
    const int64_t count = all - from < kDepth ? all - from : kDepth;
    const int64_t columns = (count * kBlock + kTileColumns - 1) / kTileColumns * kTileColumns;
    LoadTokens(tokens, num_tokens, from, count, columns, tiles->tokens);
    for (int64_t row = 0; row < rows.count(); row += kRowsAtOnce) {
      const bool wide = row + kRowsAtOnce <= rows.count();
      LoadTiles(rows, row, from, count, columns, tiles->weights[0], scratch);
      if (wide) LoadTiles(rows, row + kTile, from, count, columns, tiles->weights[1], scratch);
      const auto multiply = wide ? MultiplyTiles<2> : MultiplyTiles<1>;
      multiply(*tiles, num_tokens, columns, from == 0, sums + row, stride);
    }
  }
}

template <class ForFew>
struct Amx : ForFew {
  static constexpr bool kTiles = true;
  static constexpr auto kMultiplyByTiles = MultiplyByTiles;
};

}  // namespace

const Stages kAmx = StagesOf<Amx<Avx512Codes>, Avx512Values, Amx<Avx512Narrow>>();

}  // namespace jax_nvfp4_moe::cpu
