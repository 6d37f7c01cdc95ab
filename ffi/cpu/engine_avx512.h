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

INLINE __m512i Four512(const uint8_t* codes) {
  int32_t bits;
  memcpy(&bits, codes, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// start + sums of 16 products of a byte from 0 to 24 and one from -12 to 12, for each of 16 rows.
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

// The four dwords of each of eight blocks, numbers `which` and `which` + 2 of them.
template <int which>
INLINE __m512i Halves512(__m512i even_blocks, __m512i odd_blocks) {
  constexpr int kChoice = which == 0 ? 0x88 : 0xDD;
  return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(even_blocks),
                                               _mm512_castsi512_ps(odd_blocks), kChoice));
}

struct Along512 {
  static constexpr int64_t kBlocks = 8, kTotals = 16;
  using Sums = __m512;
  struct Token {
    __m512i even, odd;   // twice the values, signed
    __m512i correction;  // -12 times their sum, as codes are shifted
    __m512 scale;
  };
  struct Row {
    __m512i even, odd;  // twice the values plus 12
    __m512 scale;
  };

  static INLINE Sums Zero() { return _mm512_setzero_ps(); }

  static INLINE Token Prepare(const Codes* x) {
    const auto four = [&](int64_t first) INLINE_LAMBDA {  // every other block
      const auto one = [&](int64_t b) INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[b].shifted));
      };
      __m512i v = _mm512_castsi128_si512(one(first));
      v = _mm512_inserti32x4(v, one(first + 2), 1);
      v = _mm512_inserti32x4(v, one(first + 4), 2);
      v = _mm512_inserti32x4(v, one(first + 6), 3);
      return _mm512_sub_epi8(v, _mm512_set1_epi8(12));
    };
    const __m512i a = four(0), b = four(1), zero = _mm512_setzero_si512();
    Token token;
    token.even = Halves512<0>(a, b);
    token.odd = Halves512<1>(a, b);
    const __m512i twelve = _mm512_set1_epi8(12);
    token.correction =
        _mm512_sub_epi32(zero, Dot(Dot(zero, twelve, token.even), twelve, token.odd));
    const __m256 scales = _mm256_setr_ps(x[0].scale, x[1].scale, x[2].scale, x[3].scale, x[4].scale,
                                         x[5].scale, x[6].scale, x[7].scale);
    token.scale =
        _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                              _mm512_castps256_ps512(scales));
    return token;
  }

  static INLINE __m512i Dot(__m512i start, __m512i unsigned_bytes, __m512i signed_bytes) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(start, unsigned_bytes, signed_bytes);
#else
    const __m512i pairs = _mm512_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm512_add_epi32(start, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }

  static INLINE Row Decode(const uint8_t* codes, const uint8_t* scales) {
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i low = _mm512_set1_epi8(15), packed = _mm512_loadu_si512(codes);
    Row w;
    w.even = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, low));
    w.odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low));
    // Of each scale two float16 whose exponent has another bias: times 2**-8 (panel_x86.h).
    int64_t eight;
    memcpy(&eight, scales, sizeof eight);
    const __m256i places = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,
                                            -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    const __m256i upper = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), places);
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(upper, 1),
                                            _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
    w.scale = _mm512_cvtph_ps(halves);
    return w;
  }

  static INLINE Sums Add(Sums sums, const Row& w, const Token& x) {
    const __m512i dot = Dot(Dot(x.correction, w.even, x.even), w.odd, x.odd);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(w.scale, x.scale), sums);
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

struct Avx512Codes : Avx512 {
  static constexpr bool kAlong = true;
  using Along = Along512;
  using Block = Codes;
  struct Weights {
    __m512i code[4];     // twice the value, in the order of Codes::shifted
    __m512i correction;  // -12 times the sum of a row's, as the tokens' are shifted
    __m512 scale;
  };
  struct Operand {
    __m512i code[4];
    __m512 scale;
  };

  static INLINE Weights Unpack(const __m512i* packed, const float* scales) {
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m512i low = _mm512_set1_epi8(15);
    Weights w;
    for (int i = 0; i < 2; ++i) {
      const __m512i odd = _mm512_srli_epi16(packed[i], 4);
      w.code[2 * i] = _mm512_shuffle_epi8(table, _mm512_and_si512(packed[i], low));
      w.code[2 * i + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(odd, low));
    }
    const __m512i shift = _mm512_set1_epi8(12), shifts[4] = {shift, shift, shift, shift};
    const __m512i zero = _mm512_setzero_si512();
    w.correction = _mm512_sub_epi32(zero, Dot512(zero, shifts, w.code));
    w.scale = _mm512_loadu_ps(scales);
    return w;
  }

  static INLINE Operand Broadcast(const Codes& x) {
    return {{Four512(x.shifted), Four512(x.shifted + 4), Four512(x.shifted + 8),
             Four512(x.shifted + 12)},
            _mm512_set1_ps(x.scale)};
  }

  static INLINE Sums Add(Sums sums, const Weights& w, const Operand& x) {
    const __m512 product = _mm512_cvtepi32_ps(Dot512(w.correction, x.code, w.code));
    return _mm512_fmadd_ps(product, _mm512_mul_ps(w.scale, x.scale), sums);
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
