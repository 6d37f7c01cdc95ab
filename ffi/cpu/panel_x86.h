// Panels of 8 rows with AVX2 and F16C, which the wider levels have too.

#ifndef JAX_NVFP4_MOE_CPU_PANEL_X86_H_
#define JAX_NVFP4_MOE_CPU_PANEL_X86_H_

#include <immintrin.h>

#include "scales.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// What codes stand for: twice their values plus kShift.
INLINE __m128i ShiftedValues() {
  return _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
}

// 8 rows of 8 dwords, transposed: to[i] holds the rows' dwords number i.
INLINE void Transpose8x8(const uint8_t* const* rows, int64_t offset, __m256i* to) {
  for (int half = 0; half < 2; ++half) {
    __m256i v[4];  // rows 0..3, each with the one 4 below
    for (int i = 0; i < 4; ++i) {
      const uint8_t* const low = rows[i] + offset + 16 * half;
      const uint8_t* const high = rows[i + 4] + offset + 16 * half;
      v[i] = _mm256_inserti128_si256(
          _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    to[4 * half] = _mm256_unpacklo_epi64(a, c);
    to[4 * half + 1] = _mm256_unpackhi_epi64(a, c);
    to[4 * half + 2] = _mm256_unpacklo_epi64(b, d);
    to[4 * half + 3] = _mm256_unpackhi_epi64(b, d);
  }
}

// E4M3 scales, 16 blocks of 8 rows, times 2**-8. The bits of a positive one are those of a float16
// whose exponent has another bias; unlike a float's, its subnormals are never flushed.
INLINE void DecodeScales8x16(const __m128i* v, float* to, int64_t stride) {
  const __m128i zero = _mm_setzero_si128();
  __m128i pairs[8], fours[8];
  for (int i = 0; i < 4; ++i) {  // rows 2i and 2i + 1: blocks 0..7, blocks 8..15
    pairs[i] = _mm_unpacklo_epi8(v[2 * i], v[2 * i + 1]);
    pairs[i + 4] = _mm_unpackhi_epi8(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // rows 0..3 or 4..7, 4 blocks each
    fours[2 * i] = _mm_unpacklo_epi16(pairs[2 * i], pairs[2 * i + 1]);
    fours[2 * i + 1] = _mm_unpackhi_epi16(pairs[2 * i], pairs[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // blocks 4i .. 4i + 3
    const int at = i / 2 * 4 + i % 2;
    const __m128i low = _mm_unpacklo_epi32(fours[at], fours[at + 2]);
    const __m128i high = _mm_unpackhi_epi32(fours[at], fours[at + 2]);
    const __m128i wide[4] = {_mm_unpacklo_epi8(zero, low), _mm_unpackhi_epi8(zero, low),
                             _mm_unpacklo_epi8(zero, high), _mm_unpackhi_epi8(zero, high)};
    for (int j = 0; j < 4; ++j) {
      _mm256_storeu_ps(to + (4 * i + j) * stride, _mm256_cvtph_ps(_mm_srli_epi16(wide[j], 1)));
    }
  }
}

OUTLINE void DecodeScalesOf8(const uint8_t* const* rows, int64_t count, float* to,
                             int64_t stride) {
  __m128i v[8], most = _mm_setzero_si128();
  int64_t b = 0;
  const auto load = [&](int i, const uint8_t* from) {
    v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    most = _mm_max_epu8(most, v[i]);
  };
  for (; b + 16 <= count; b += 16) {
    for (int i = 0; i < 8; ++i) load(i, rows[i] + b);
    DecodeScales8x16(v, to + b * stride, stride);
  }
  if (b < count) {
    float rest[16 * 8];
    for (int i = 0; i < 8; ++i) {
      uint8_t bytes[16] = {};
      memcpy(bytes, rows[i] + b, count - b);
      load(i, bytes);
    }
    DecodeScales8x16(v, rest, 8);
    for (int64_t i = b; i < count; ++i) memcpy(to + i * stride, rest + (i - b) * 8, 32);
  }
  // Negative scales and NaNs, which no quantiser makes, one by one.
  const __m128i above = _mm_cmpeq_epi8(_mm_max_epu8(most, _mm_set1_epi8(0x7F)), most);
  if (__builtin_expect(_mm_movemask_epi8(above) != 0, 0)) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      for (int64_t i = 0; i < count; ++i) to[i * stride + lane] = DecodeScale(rows[lane][i]);
    }
  }
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_PANEL_X86_H_
