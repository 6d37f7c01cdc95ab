// The level for AVX2, FMA and F16C.

#include <immintrin.h>

#include "level.h"
#include "panel_x86.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kLanes = 8, kVectors = 4;
  static constexpr bool kTiles = false;
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

struct Avx2Codes : Avx2 {
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
