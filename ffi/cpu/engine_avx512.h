// Products with AVX-512 F, BW, VL and DQ; with VNNI, and with BF16, where the file that includes
// this is compiled for them.

#ifndef JAX_NVFP4_MOE_CPU_ENGINE_AVX512_H_
#define JAX_NVFP4_MOE_CPU_ENGINE_AVX512_H_

#include <immintrin.h>

#include "along.h"
#include "panel_x86.h"
#include "products.h"

namespace jax_nvfp4_moe::cpu {
namespace {

struct Avx512 {
  static constexpr int64_t kLanes = 16, kVectors = 4;
  static constexpr bool kAlong = false, kTiles = false;
  using Sums = __m512;
  using Packed = __m512i;

  static INLINE Sums Zero() { return _mm512_setzero_ps(); }
  static INLINE Sums Load(const float* from) { return _mm512_loadu_ps(from); }
  static INLINE void Store(float* to, Sums sums) { _mm512_storeu_ps(to, sums); }

  static INLINE void Transpose(const uint8_t* const* rows, int64_t offset, __m512i* to) {
    __m256i low[8], high[8];
    Transpose8x8(rows, offset, low);
    Transpose8x8(rows + 8, offset, high);
    for (int i = 0; i < 8; ++i) {
      to[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low[i]), high[i], 1);
    }
  }

  static INLINE void DecodeScales(const uint8_t* const* rows, int64_t count, float* to) {
    DecodeScalesOf8(rows, count, to, kLanes);
    DecodeScalesOf8(rows + 8, count, to + 8, kLanes);
  }
};

INLINE __m512i Four512(const int8_t* codes) {
  int32_t bits;
  memcpy(&bits, codes, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// start + sums of 16 products of a byte from 0 to 24 and one from -12 to 12, in each lane.
INLINE __m512i Dot512(__m512i start, const __m512i* unsigned_bytes, const __m512i* signed_bytes) {
#if defined(__AVX512VNNI__)
  for (int i = 0; i < 4; ++i) {
    start = _mm512_dpbusd_epi32(start, unsigned_bytes[i], signed_bytes[i]);
  }
  return start;
#else
  __m512i sum = _mm512_maddubs_epi16(unsigned_bytes[0], signed_bytes[0]);
  for (int i = 1; i < 4; ++i) {  // eight pairs of products stay below 2**15
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(unsigned_bytes[i], signed_bytes[i]));
  }
  return _mm512_add_epi32(start, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)));
#endif
}

// A block in each lane, of as many rows, or along a row.
struct Avx512Codes : Avx512 {
  static constexpr bool kAlong = true;
  static constexpr int kTotals = 16;
  using Block = Codes;
  struct Weights {
    __m512i code[4];  // what they mean, in the order of Codes::doubled
    __m512 scale;
  };
  struct Operand {
    __m512i code[4];  // Codes::doubled
    __m512i correction;
    __m512 scale;
  };

  static INLINE Weights Decoded(const __m512i* packed, __m512 scale) {
    const __m512i table = _mm512_broadcast_i32x4(ShiftedValues()), low = _mm512_set1_epi8(15);
    Weights w;
    for (int i = 0; i < 2; ++i) {
      const __m512i odd = _mm512_srli_epi16(packed[i], 4);
      w.code[2 * i] = _mm512_shuffle_epi8(table, _mm512_and_si512(packed[i], low));
      w.code[2 * i + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(odd, low));
    }
    w.scale = scale;
    return w;
  }

  static INLINE Weights Unpack(const __m512i* packed, const float* scales) {
    return Decoded(packed, _mm512_loadu_ps(scales));
  }

  static INLINE Operand Broadcast(const Codes& x) {
    return {{Four512(x.doubled), Four512(x.doubled + 4), Four512(x.doubled + 8),
             Four512(x.doubled + 12)},
            _mm512_set1_epi32(x.correction),
            _mm512_set1_ps(x.scale)};
  }

  static INLINE Sums Add(Sums sums, const Weights& w, const Operand& x) {
    const __m512 product = _mm512_cvtepi32_ps(Dot512(x.correction, w.code, x.code));
    return _mm512_fmadd_ps(product, _mm512_mul_ps(w.scale, x.scale), sums);
  }

  // Along a row, blocks lie in the order in which _mm512_shuffle_ps leaves them, in each quarter
  // two of the first eight and two of the last eight.

  static INLINE Operand Gather(const Codes* x) {
    const auto four = [&](int64_t first) INLINE_LAMBDA {  // every other block
      const auto one = [&](int64_t b) INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[b].doubled));
      };
      __m512i v = _mm512_castsi128_si512(one(first));
      v = _mm512_inserti32x4(v, one(first + 2), 1);
      v = _mm512_inserti32x4(v, one(first + 4), 2);
      return _mm512_inserti32x4(v, one(first + 6), 3);
    };
    const __m512i a = four(0), b = four(1), c = four(8), d = four(9);
    const __m512i low[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)};
    const __m512i high[2] = {_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)};
    alignas(64) int32_t correction[kLanes];
    alignas(64) float scale[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t block = lane / 4 * 2 + lane % 4 / 2 * 8 + lane % 2;
      correction[lane] = x[block].correction;
      scale[lane] = x[block].scale;
    }
    return {{_mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
             _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])},
            _mm512_load_si512(correction),
            _mm512_load_ps(scale)};
  }

  static INLINE Weights Decode(const uint8_t* codes, const uint8_t* scales) {
    const __m512 a = _mm512_loadu_ps(codes), b = _mm512_loadu_ps(codes + 64);
    const __m512i packed[2] = {_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                               _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD))};
    // Of each scale a float16 whose exponent has another bias: times 2**-8 (panel_x86.h).
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
    const __m256i upper = _mm256_shuffle_epi8(
        bytes, _mm256_setr_epi8(-1, 0, -1, 1, -1, 8, -1, 9, -1, 2, -1, 3, -1, 10, -1, 11,  //
                                -1, 4, -1, 5, -1, 12, -1, 13, -1, 6, -1, 7, -1, 14, -1, 15));
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(upper, 1),
                                            _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
    return Decoded(packed, _mm512_cvtph_ps(halves));
  }

  static INLINE bool AnyNan(const uint8_t* scales, int64_t count) {
    const __m512i nan = _mm512_set1_epi8(0x7F);
    __mmask64 any = 0;
    for (int64_t b = 0; b < count; b += 64) {
      const __mmask64 there = count - b < 64 ? (uint64_t{1} << (count - b)) - 1 : ~uint64_t{0};
      const __m512i v = _mm512_maskz_loadu_epi8(there, scales + b);
      any |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(v, nan), nan);
    }
    return any != 0;
  }

  static INLINE void StoreTotals(const Sums* v, bool first, float* to) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 lanes =
        _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
    const __m256 halves =
        _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    _mm_storeu_ps(to, first ? sum : _mm_add_ps(_mm_loadu_ps(to), sum));
  }
};

// The value of element `i` of a block in each row: code times scale, exact.
INLINE __m512 Value512(const __m512i* packed, int i, __m512 scale) {
  const __m512 table = _mm512_setr_ps(0, 128, 256, 384, 512, 768, 1024, 1536, -0.0f, -128, -256,
                                      -384, -512, -768, -1024, -1536);
  // vpermps looks at four bits of each index.
  const __m512i code = _mm512_srli_epi32(packed[i / 8], static_cast<unsigned>(i % 8 * 4));
  return _mm512_mul_ps(_mm512_permutexvar_ps(code, table), scale);
}

struct Avx512Values : Avx512 {
  using Block = Values;
  using Operand = const Values&;
  struct Weights {
    __m512 value[kBlock];
  };

  static INLINE Weights Unpack(const __m512i* packed, const float* scales) {
    const __m512 scale = _mm512_loadu_ps(scales);
    Weights w;
    for (int i = 0; i < kBlock; ++i) w.value[i] = Value512(packed, i, scale);
    return w;
  }

  static INLINE const Values& Broadcast(const Values& x) { return x; }

  static INLINE Sums Add(Sums sums, const Weights& w, const Values& x) {
    for (int i = 0; i < kBlock; ++i) {
      sums = _mm512_fmadd_ps(w.value[i], _mm512_set1_ps(x.value[i]), sums);
    }
    return sums;
  }
};

#if defined(__AVX512BF16__)

// Two neighbouring elements of a block in each row, in bfloat16, the first in the lower half. Both
// have at most six significant bits.
INLINE __m512i Pair512(const __m512i* packed, int pair, __m512 scale) {
  const __m512i even = _mm512_castps_si512(Value512(packed, 2 * pair, scale));
  const __m512i odd = _mm512_castps_si512(Value512(packed, 2 * pair + 1, scale));
  const __m512i upper = _mm512_and_si512(odd, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), upper);
}

struct Avx512Narrow : Avx512 {
  using Block = Narrow;
  using Operand = const Narrow&;
  struct Weights {
    __m512i pair[kBlock / 2];
  };

  static INLINE Weights Unpack(const __m512i* packed, const float* scales) {
    const __m512 scale = _mm512_loadu_ps(scales);
    Weights w;
    for (int i = 0; i < kBlock / 2; ++i) w.pair[i] = Pair512(packed, i, scale);
    return w;
  }

  static INLINE const Narrow& Broadcast(const Narrow& x) { return x; }

  static INLINE Sums Add(Sums sums, const Weights& w, const Narrow& x) {
    for (int i = 0; i < kBlock / 2; ++i) {
      int32_t pair;
      memcpy(&pair, x.value + 2 * i, sizeof pair);
      sums = _mm512_dpbf16_ps(sums, (__m512bh)w.pair[i], (__m512bh)_mm512_set1_epi32(pair));
    }
    return sums;
  }
};

#endif  // __AVX512BF16__

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_ENGINE_AVX512_H_
