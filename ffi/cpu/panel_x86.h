// Panels of 8 rows with AVX2 and F16C, which the wider levels have too.

#ifndef JAX_NVFP4_MOE_CPU_PANEL_X86_H_
#define JAX_NVFP4_MOE_CPU_PANEL_X86_H_

#include <immintrin.h>

#include "products.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// 8 rows of 8 dwords, transposed: to[i * stride + lane] = rows[lane][i].
INLINE void Transpose8x8(const uint8_t* const* rows, int64_t offset, uint32_t* to, int64_t stride) {
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
    auto* const out = to + 4 * half * stride;
    const auto store = [&](int i, __m256i x) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * stride), x);
    };
    store(0, _mm256_unpacklo_epi64(a, c));
    store(1, _mm256_unpackhi_epi64(a, c));
    store(2, _mm256_unpacklo_epi64(b, d));
    store(3, _mm256_unpackhi_epi64(b, d));
  }
}

// The codes of 8 rows: the dwords of each beside each other, `stride` apart.
INLINE void Transpose8(const uint8_t* const* rows, int64_t count, uint32_t* to, int64_t stride) {
  int64_t b = 0;
  for (; b + 4 <= count; b += 4) Transpose8x8(rows, b * 8, to + b * 2 * stride, stride);
  for (; b < count; ++b) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      memcpy(to + b * 2 * stride + lane, rows[lane] + b * 8, 4);
      memcpy(to + (b * 2 + 1) * stride + lane, rows[lane] + b * 8 + 4, 4);
    }
  }
}

// Eight E4M3 scales, the low bytes, times 2**-8. Their bits are those of a float16 whose exponent
// has another bias; unlike a float's, its subnormals are never flushed.
INLINE __m256 DecodeScales8(__m128i bytes) {
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  const __m128i all = _mm_set1_epi16(0x3F80);  // 0x7F: NaN
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(wide, all), all);
  const __m128i half = _mm_and_si128(wide, _mm_set1_epi16(static_cast<int16_t>(0xBF80)));
  return _mm256_cvtph_ps(_mm_or_si128(half, nan));
}

// 16 blocks of 8 rows.
INLINE void DecodeScales8x16(const __m128i* v, float* to, int64_t stride) {
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
    float* const out = to + 4 * i * stride;
    _mm256_storeu_ps(out, DecodeScales8(low));
    _mm256_storeu_ps(out + stride, DecodeScales8(_mm_unpackhi_epi64(low, low)));
    _mm256_storeu_ps(out + 2 * stride, DecodeScales8(high));
    _mm256_storeu_ps(out + 3 * stride, DecodeScales8(_mm_unpackhi_epi64(high, high)));
  }
}

INLINE void DecodeScalesOf8(const uint8_t* const* rows, int64_t count, float* to, int64_t stride) {
  __m128i v[8];
  int64_t b = 0;
  for (; b + 16 <= count; b += 16) {
    for (int i = 0; i < 8; ++i) {
      v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + b));
    }
    DecodeScales8x16(v, to + b * stride, stride);
  }
  if (b == count) return;
  alignas(32) float rest[16 * 8];
  for (int i = 0; i < 8; ++i) {
    uint8_t bytes[16] = {};
    memcpy(bytes, rows[i] + b, count - b);
    memcpy(&v[i], bytes, sizeof bytes);
  }
  DecodeScales8x16(v, rest, 8);
  for (int64_t i = b; i < count; ++i) memcpy(to + i * stride, rest + (i - b) * 8, 32);
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_PANEL_X86_H_
