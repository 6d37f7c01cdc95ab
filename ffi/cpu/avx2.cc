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

INLINE __m256i Four(const uint8_t* codes) {
  int32_t bits;
  memcpy(&bits, codes, sizeof bits);
  return _mm256_set1_epi32(bits);
}

struct Along256 {
  static constexpr int64_t kBlocks = 4, kTotals = 8;
  using Sums = __m256;
  struct Token {
    __m256i even, odd;   // twice the values, signed
    __m256i correction;  // -12 times their sum, as codes are shifted
    __m256 scale;
  };
  struct Row {
    __m256i even, odd;  // twice the values plus 12
    __m256 scale;
  };

  static INLINE Sums Zero() { return _mm256_setzero_ps(); }

  static INLINE Token Prepare(const Codes* x) {
    const auto two = [&](int64_t first) INLINE_LAMBDA {  // every other block
      const auto one = [&](int64_t b) INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[b].shifted));
      };
      const __m256i both =
          _mm256_inserti128_si256(_mm256_castsi128_si256(one(first)), one(first + 2), 1);
      return _mm256_castsi256_ps(_mm256_sub_epi8(both, _mm256_set1_epi8(12)));
    };
    const __m256 a = two(0), b = two(1);
    Token token;
    token.even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));  // dwords 0 and 2 of each
    token.odd = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
    const __m256i twelve = _mm256_set1_epi8(12);
    token.correction =
        _mm256_sub_epi32(_mm256_setzero_si256(), Dot(twelve, token.even, twelve, token.odd));
    token.scale = _mm256_setr_ps(x[0].scale, x[0].scale, x[1].scale, x[1].scale, x[2].scale,
                                 x[2].scale, x[3].scale, x[3].scale);
    return token;
  }

  // Eight products of at most 24 * 12 in each half stay below 2**15.
  static INLINE __m256i Dot(__m256i a, __m256i x, __m256i b, __m256i y) {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, y));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

  static INLINE Row Decode(const uint8_t* codes, const uint8_t* scales) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    Row w;
    w.even = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
    w.odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
    // Of each scale two float16 whose exponent has another bias: times 2**-8 (panel_x86.h).
    int32_t four;
    memcpy(&four, scales, sizeof four);
    const __m128i upper =
        _mm_shuffle_epi8(_mm_cvtsi32_si128(four),
                         _mm_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3));
    const __m128i halves =
        _mm_and_si128(_mm_srai_epi16(upper, 1), _mm_set1_epi16(static_cast<int16_t>(0xBFFF)));
    w.scale = _mm256_cvtph_ps(halves);
    return w;
  }

  static INLINE Sums Add(Sums sums, const Row& w, const Token& x) {
    const __m256i dot = _mm256_add_epi32(Dot(w.even, x.even, w.odd, x.odd), x.correction);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(w.scale, x.scale), sums);
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

struct Avx2Codes : Avx2 {
  static constexpr bool kAlong = true;
  using Along = Along256;
  using Block = Codes;
  struct Weights {
    __m256i code[4];     // twice the value, in the order of Codes::shifted
    __m256i correction;  // -12 times the sum of a row's, as the tokens' are shifted
    __m256 scale;
  };
  struct Operand {
    __m256i code[4];
    __m256 scale;
  };

  static INLINE Weights Unpack(const __m256i* packed, const float* scales) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i low = _mm256_set1_epi8(15);
    Weights w;
    for (int i = 0; i < 2; ++i) {
      const __m256i odd = _mm256_srli_epi16(packed[i], 4);
      w.code[2 * i] = _mm256_shuffle_epi8(table, _mm256_and_si256(packed[i], low));
      w.code[2 * i + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(odd, low));
    }
    const __m256i sum = _mm256_add_epi8(_mm256_add_epi8(w.code[0], w.code[1]),
                                        _mm256_add_epi8(w.code[2], w.code[3]));
    const __m256i shifted = _mm256_maddubs_epi16(_mm256_set1_epi8(12), sum);
    w.correction = _mm256_madd_epi16(shifted, _mm256_set1_epi16(-1));
    w.scale = _mm256_loadu_ps(scales);
    return w;
  }

  static INLINE Operand Broadcast(const Codes& x) {
    return {{Four(x.shifted), Four(x.shifted + 4), Four(x.shifted + 8), Four(x.shifted + 12)},
            _mm256_set1_ps(x.scale)};
  }

  static INLINE Sums Add(Sums sums, const Weights& w, const Operand& x) {
    // Eight products of at most 24 * 12 in each half stay below 2**15.
    __m256i pairs = _mm256_maddubs_epi16(x.code[0], w.code[0]);
    for (int i = 1; i < 4; ++i) {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(x.code[i], w.code[i]));
    }
    const __m256i product =
        _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), w.correction);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), _mm256_mul_ps(w.scale, x.scale), sums);
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
