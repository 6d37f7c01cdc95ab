// The level for AVX2, FMA and F16C.

#include <immintrin.h>

#include "level.h"
#include "panel_x86.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kLanes = 8, kVectors = 4;
  static constexpr bool kAlong = false, kTiles = false;
  using Sums = __m256;
  using Packed = __m256i;

  static INLINE Sums Zero() { return _mm256_setzero_ps(); }
  static INLINE Sums Load(const float* from) { return _mm256_loadu_ps(from); }
  static INLINE void Store(float* to, Sums sums) { _mm256_storeu_ps(to, sums); }
  static INLINE void Transpose(const uint8_t* const* rows, int64_t offset, __m256i* to) {
    Transpose8x8(rows, offset, to);
  }
  static INLINE void DecodeScales(const uint8_t* const* rows, int64_t count, float* to) {
    DecodeScalesOf8(rows, count, to, kLanes);
  }
};

INLINE __m256i Four(const int8_t* codes) {
  int32_t bits;
  memcpy(&bits, codes, sizeof bits);
  return _mm256_set1_epi32(bits);
}

// A block in each lane, of as many rows, or along a row.
struct Avx2Codes : Avx2 {
  static constexpr bool kAlong = true;
  static constexpr int kTotals = 8;
  using Block = Codes;
  struct Weights {
    __m256i code[4];  // what they mean, in the order of Codes::doubled
    __m256 scale;
  };
  struct Operand {
    __m256i code[4];  // Codes::doubled
    __m256i correction;
    __m256 scale;
  };

  static INLINE Weights Decoded(const __m256i* packed, __m256 scale) {
    const __m256i table = _mm256_broadcastsi128_si256(ShiftedValues()), low = _mm256_set1_epi8(15);
    Weights w;
    for (int i = 0; i < 2; ++i) {
      const __m256i odd = _mm256_srli_epi16(packed[i], 4);
      w.code[2 * i] = _mm256_shuffle_epi8(table, _mm256_and_si256(packed[i], low));
      w.code[2 * i + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(odd, low));
    }
    w.scale = scale;
    return w;
  }

  static INLINE Weights Unpack(const __m256i* packed, const float* scales) {
    return Decoded(packed, _mm256_loadu_ps(scales));
  }

  static INLINE Operand Broadcast(const Codes& x) {
    return {{Four(x.doubled), Four(x.doubled + 4), Four(x.doubled + 8), Four(x.doubled + 12)},
            _mm256_set1_epi32(x.correction),
            _mm256_set1_ps(x.scale)};
  }

  static INLINE Sums Add(Sums sums, const Weights& w, const Operand& x) {
    // Eight products of at most 24 * 12 in each half stay below 2**15.
    __m256i pairs = _mm256_maddubs_epi16(w.code[0], x.code[0]);
    for (int i = 1; i < 4; ++i) {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.code[i], x.code[i]));
    }
    const __m256i product =
        _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), x.correction);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), _mm256_mul_ps(w.scale, x.scale), sums);
  }

  // Along a row, blocks lie in the order in which _mm256_shuffle_ps leaves them, in each half two
  // of the first four and two of the last four.

  static INLINE Operand Gather(const Codes* x) {
    const auto two = [&](int64_t first) INLINE_LAMBDA {  // every other block
      const auto one = [&](int64_t b) INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[b].doubled));
      };
      return _mm256_inserti128_si256(_mm256_castsi128_si256(one(first)), one(first + 2), 1);
    };
    const __m256i a = two(0), b = two(1), c = two(4), d = two(5);
    const __m256i low[2] = {_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d)};
    const __m256i high[2] = {_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d)};
    return {{_mm256_unpacklo_epi64(low[0], low[1]), _mm256_unpackhi_epi64(low[0], low[1]),
             _mm256_unpacklo_epi64(high[0], high[1]), _mm256_unpackhi_epi64(high[0], high[1])},
            _mm256_setr_epi32(x[0].correction, x[1].correction, x[4].correction, x[5].correction,
                              x[2].correction, x[3].correction, x[6].correction, x[7].correction),
            _mm256_setr_ps(x[0].scale, x[1].scale, x[4].scale, x[5].scale, x[2].scale, x[3].scale,
                           x[6].scale, x[7].scale)};
  }

  static INLINE Weights Decode(const uint8_t* codes, const uint8_t* scales) {
    const auto* const bits = reinterpret_cast<const float*>(codes);
    const __m256 a = _mm256_loadu_ps(bits), b = _mm256_loadu_ps(bits + 8);
    const __m256i packed[2] = {_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)),
                               _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD))};
    // Of each scale a float16 whose exponent has another bias: times 2**-8 (panel_x86.h).
    const __m128i upper =
        _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)),
                         _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 2, -1, 3, -1, 6, -1, 7));
    const __m128i halves =
        _mm_and_si128(_mm_srai_epi16(upper, 1), _mm_set1_epi16(static_cast<int16_t>(0xBFFF)));
    return Decoded(packed, _mm256_cvtph_ps(halves));
  }

  static INLINE void StoreTotals(const Sums* v, bool first, float* to) {
    const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    _mm_storeu_ps(to, first ? sum : _mm_add_ps(_mm_loadu_ps(to), sum));
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
};

struct Avx2Values : Avx2 {
  using Block = Values;
  using Operand = const Values&;
  struct Weights {
    __m256 value[kBlock];
  };

  static INLINE Weights Unpack(const __m256i* packed, const float* scales) {
    const __m256 table = _mm256_setr_ps(0, 128, 256, 384, 512, 768, 1024, 1536);
    const __m256 scale = _mm256_loadu_ps(scales), sign = _mm256_set1_ps(-0.0f);
    Weights w;
    for (int i = 0; i < kBlock; ++i) {
      const __m256i code = packed[i / 8];
      const __m256 magnitude =  // vpermps looks at three bits of each index
          _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(code, i % 8 * 4));
      const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28 - i % 8 * 4));
      w.value[i] = _mm256_mul_ps(_mm256_xor_ps(magnitude, _mm256_and_ps(top, sign)), scale);
    }
    return w;
  }

  static INLINE const Values& Broadcast(const Values& x) { return x; }

  static INLINE Sums Add(Sums sums, const Weights& w, const Values& x) {
    for (int i = 0; i < kBlock; ++i) {
      sums = _mm256_fmadd_ps(w.value[i], _mm256_set1_ps(x.value[i]), sums);
    }
    return sums;
  }
};

}  // namespace

const Stages kAvx2 = StagesOf<Avx2Codes, Avx2Values>();

}  // namespace jax_nvfp4_moe::cpu
