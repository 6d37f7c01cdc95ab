// Vectors of AVX2 and of AVX-512: what the engines of x86 (engine_x86.h) are templates of.
//
// A vector has kLanes lanes of 32 bits and is wholly described by:
//   Sums, Packed             a register of floats; of integers
//   kTotals                  sums that gemv.h keeps in registers at once
//   Zero, Load, Store, Add, Multiply, Fma, All, FromInts    on floats
//   Transpose, DecodeScales  rows and scales in lanes, as products.h takes them
//   AllBits, OddCodes, LowNibbles, Lookup, LowDwords, HighDwords, LowQwords, HighQwords
//   Dot(start, u, s)         start + 16 products in each lane, of bytes u from 0 to 24 and s from
//                            -12 to 12
//   Value(packed, i, scale)  code i of a block in each lane, times 256, times scale: exact
// and, for blocks of one row side by side (gemv.h), in the lanes' order of `BlockOf`:
//   FromLanes(get), EveryOther(blocks), LoadCodes(codes, packed), LoadScales(scales)
//   AnyNan(scales, count), StoreTotals(sums, first, to)

#ifndef JAX_NVFP4_MOE_CPU_VECTOR_X86_H_
#define JAX_NVFP4_MOE_CPU_VECTOR_X86_H_

#include <immintrin.h>

#include "panel_x86.h"
#include "products.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// The block in a lane, where LoadCodes leaves it: a quarter of a register has two neighbours of the
// first half of the blocks and two of the second half.
template <int64_t kLanes>
constexpr int64_t BlockOf(int64_t lane) {
  return lane / 4 * 2 + lane % 4 / 2 * (kLanes / 2) + lane % 2;
}

INLINE __m128i LoadDoubled(const E2m1Block& block) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.doubled));
}

struct Vector256 {
  static constexpr int64_t kLanes = 8;
  static constexpr int kTotals = 8;
  using Sums = __m256;
  using Packed = __m256i;

  static INLINE Sums Zero() { return _mm256_setzero_ps(); }
  static INLINE Sums Load(const float* from) { return _mm256_loadu_ps(from); }
  static INLINE void Store(float* to, Sums sums) { _mm256_storeu_ps(to, sums); }
  static INLINE Sums All(float x) { return _mm256_set1_ps(x); }
  static INLINE Sums Multiply(Sums a, Sums b) { return _mm256_mul_ps(a, b); }
  static INLINE Sums Fma(Sums a, Sums b, Sums c) { return _mm256_fmadd_ps(a, b, c); }
  static INLINE Sums FromInts(Packed x) { return _mm256_cvtepi32_ps(x); }

  static INLINE Packed AllBits(int32_t x) { return _mm256_set1_epi32(x); }
  static INLINE Packed OddCodes(Packed x) { return _mm256_srli_epi16(x, 4); }
  static INLINE Packed LowNibbles(Packed x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static INLINE Packed Lookup(__m128i table, Packed index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);
  }
  static INLINE Packed LowDwords(Packed a, Packed b) { return _mm256_unpacklo_epi32(a, b); }
  static INLINE Packed HighDwords(Packed a, Packed b) { return _mm256_unpackhi_epi32(a, b); }
  static INLINE Packed LowQwords(Packed a, Packed b) { return _mm256_unpacklo_epi64(a, b); }
  static INLINE Packed HighQwords(Packed a, Packed b) { return _mm256_unpackhi_epi64(a, b); }

  static INLINE void Transpose(const uint8_t* const* rows, int64_t offset, Packed* to) {
    Transpose8x8(rows, offset, to);
  }

  static INLINE void DecodeScales(const uint8_t* const* rows, int64_t count, float* to) {
    DecodeScalesOf8(rows, count, to, kLanes);
  }

  static INLINE Packed Dot(Packed start, const Packed* u, const Packed* s) {
    __m256i sum = _mm256_maddubs_epi16(u[0], s[0]);
    for (int i = 1; i < 4; ++i) {  // eight products of at most 24 * 12 stay below 2**15
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u[i], s[i]));
    }
    return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), start);
  }

  static INLINE Sums Value(const Packed* packed, int i, Sums scale) {
    const __m256 table = _mm256_setr_ps(0, 128, 256, 384, 512, 768, 1024, 1536);
    const __m256i code = packed[i / 8];
    const __m256 magnitude =  // vpermps reads three bits of each index
        _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(code, i % 8 * 4));
    const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28 - i % 8 * 4));
    const __m256 sign = _mm256_and_ps(top, _mm256_set1_ps(-0.0f));
    return _mm256_mul_ps(_mm256_xor_ps(magnitude, sign), scale);
  }

  template <class Get>
  static INLINE Packed FromLanes(const Get& get) {
    return _mm256_setr_epi32(get(0), get(1), get(2), get(3), get(4), get(5), get(6), get(7));
  }

  static INLINE Packed EveryOther(const E2m1Block* x) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(LoadDoubled(x[0])), LoadDoubled(x[2]), 1);
  }

  static INLINE void LoadCodes(const uint8_t* codes, Packed* packed) {
    const auto* const bits = reinterpret_cast<const float*>(codes);
    const __m256 a = _mm256_loadu_ps(bits), b = _mm256_loadu_ps(bits + kLanes);
    packed[0] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    packed[1] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
  }

  // Times 2**-8, as in panel_x86.h; NaNs become numbers.
  static INLINE Sums LoadScales(const uint8_t* scales) {
    const __m128i upper =
        _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)),
                         _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 2, -1, 3, -1, 6, -1, 7));
    return _mm256_cvtph_ps(
        _mm_and_si128(_mm_srai_epi16(upper, 1), _mm_set1_epi16(static_cast<int16_t>(0xBFFF))));
  }

  static INLINE bool AnyNan(const uint8_t* scales, int64_t count) {
    const __m128i nan = _mm_set1_epi8(0x7F);
    __m128i any = _mm_setzero_si128();
    int64_t b = 0;
    for (; b + 16 <= count; b += 16) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + b));
      any = _mm_or_si128(any, _mm_cmpeq_epi8(_mm_and_si128(v, nan), nan));
    }
    bool found = _mm_movemask_epi8(any) != 0;
    for (; b < count; ++b) found |= (scales[b] & 0x7F) == 0x7F;
    return found;
  }

  static INLINE void StoreTotals(const Sums* v, bool first, float* to) {
    const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    _mm_storeu_ps(to, first ? sum : _mm_add_ps(_mm_loadu_ps(to), sum));
  }
};

#if defined(__AVX512F__)

struct Vector512 {
  static constexpr int64_t kLanes = 16;
  static constexpr int kTotals = 16;
  using Sums = __m512;
  using Packed = __m512i;

  static INLINE Sums Zero() { return _mm512_setzero_ps(); }
  static INLINE Sums Load(const float* from) { return _mm512_loadu_ps(from); }
  static INLINE void Store(float* to, Sums sums) { _mm512_storeu_ps(to, sums); }
  static INLINE Sums All(float x) { return _mm512_set1_ps(x); }
  static INLINE Sums Multiply(Sums a, Sums b) { return _mm512_mul_ps(a, b); }
  static INLINE Sums Fma(Sums a, Sums b, Sums c) { return _mm512_fmadd_ps(a, b, c); }
  static INLINE Sums FromInts(Packed x) { return _mm512_cvtepi32_ps(x); }

  static INLINE Packed AllBits(int32_t x) { return _mm512_set1_epi32(x); }
  static INLINE Packed OddCodes(Packed x) { return _mm512_srli_epi16(x, 4); }
  static INLINE Packed LowNibbles(Packed x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static INLINE Packed Lookup(__m128i table, Packed index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), index);
  }
  static INLINE Packed LowDwords(Packed a, Packed b) { return _mm512_unpacklo_epi32(a, b); }
  static INLINE Packed HighDwords(Packed a, Packed b) { return _mm512_unpackhi_epi32(a, b); }
  static INLINE Packed LowQwords(Packed a, Packed b) { return _mm512_unpacklo_epi64(a, b); }
  static INLINE Packed HighQwords(Packed a, Packed b) { return _mm512_unpackhi_epi64(a, b); }

  static INLINE void Transpose(const uint8_t* const* rows, int64_t offset, Packed* to) {
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

  static INLINE Packed Dot(Packed start, const Packed* u, const Packed* s) {
#if defined(__AVX512VNNI__)
    for (int i = 0; i < 4; ++i) start = _mm512_dpbusd_epi32(start, u[i], s[i]);
    return start;
#else
    __m512i sum = _mm512_maddubs_epi16(u[0], s[0]);
    for (int i = 1; i < 4; ++i) {  // as Vector256 does
      sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(u[i], s[i]));
    }
    return _mm512_add_epi32(start, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)));
#endif
  }

  static INLINE Sums Value(const Packed* packed, int i, Sums scale) {
    const __m512 table = _mm512_setr_ps(0, 128, 256, 384, 512, 768, 1024, 1536, -0.0f, -128, -256,
                                        -384, -512, -768, -1024, -1536);
    // vpermps reads four bits of each index.
    const __m512i code = _mm512_srli_epi32(packed[i / 8], static_cast<unsigned>(i % 8 * 4));
    return _mm512_mul_ps(_mm512_permutexvar_ps(code, table), scale);
  }

  template <class Get>
  static INLINE Packed FromLanes(const Get& get) {
    alignas(64) int32_t bits[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) bits[lane] = get(lane);
    return _mm512_load_si512(bits);
  }

  static INLINE Packed EveryOther(const E2m1Block* x) {
    __m512i v = _mm512_castsi128_si512(LoadDoubled(x[0]));
    v = _mm512_inserti32x4(v, LoadDoubled(x[2]), 1);
    v = _mm512_inserti32x4(v, LoadDoubled(x[4]), 2);
    return _mm512_inserti32x4(v, LoadDoubled(x[6]), 3);
  }

  static INLINE void LoadCodes(const uint8_t* codes, Packed* packed) {
    const __m512 a = _mm512_loadu_ps(codes), b = _mm512_loadu_ps(codes + 64);
    packed[0] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
    packed[1] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD));
  }

  static INLINE Sums LoadScales(const uint8_t* scales) {  // as Vector256 does
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
    const __m256i upper = _mm256_shuffle_epi8(
        bytes, _mm256_setr_epi8(-1, 0, -1, 1, -1, 8, -1, 9, -1, 2, -1, 3, -1, 10, -1, 11,  //
                                -1, 4, -1, 5, -1, 12, -1, 13, -1, 6, -1, 7, -1, 14, -1, 15));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(upper, 1),
                                            _mm256_set1_epi16(static_cast<int16_t>(0xBFFF))));
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

#endif  // __AVX512F__

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_VECTOR_X86_H_
