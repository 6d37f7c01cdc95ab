// The level for AVX2, FMA and F16C.

#include <immintrin.h>

#include "level.h"
#include "panel_x86.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kLanes = 8;
  using Sums = __m256;

  static INLINE Sums Zero() { return _mm256_setzero_ps(); }
  static INLINE Sums LoadSums(const float* from) { return _mm256_loadu_ps(from); }
  static INLINE void StoreSums(float* to, Sums sums) { _mm256_storeu_ps(to, sums); }
  static INLINE void Transpose(const uint8_t* const* rows, int64_t count, uint32_t* to) {
    Transpose8(rows, count, to, kLanes);
  }
  static INLINE void DecodeScales(const uint8_t* const* rows, int64_t count, float* to) {
    DecodeScalesOf8(rows, count, to, kLanes);
  }
};

INLINE __m256i LoadInts(const uint32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

INLINE __m256i Broadcast(const int8_t* four) {
  int32_t bits;
  memcpy(&bits, four, sizeof bits);
  return _mm256_set1_epi32(bits);
}

struct Avx2Codes : Avx2 {
  using Block = Codes;
  struct Weights {
    __m256i code[4];  // twice the value plus 12: unsigned, as one side of vpmaddubsw has to be
    __m256 scale;
  };

  static INLINE Weights Unpack(const uint32_t* codes, const float* scales) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i a = LoadInts(codes), b = LoadInts(codes + kLanes);
    Weights w;
    w.code[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(a, low));
    w.code[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), low));
    w.code[2] = _mm256_shuffle_epi8(table, _mm256_and_si256(b, low));
    w.code[3] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(b, 4), low));
    w.scale = _mm256_loadu_ps(scales);
    return w;
  }

  // Four products of at most 24 * 12, in each half: far below 2**15.
  static INLINE Sums Add(Sums sums, const Weights& w, const Codes& x) {
    const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(w.code[0], Broadcast(x.code)),
                                       _mm256_maddubs_epi16(w.code[1], Broadcast(x.code + 4)));
    const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(w.code[2], Broadcast(x.code + 8)),
                                       _mm256_maddubs_epi16(w.code[3], Broadcast(x.code + 12)));
    const __m256i pairs = _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
    const __m256i product = _mm256_add_epi32(pairs, _mm256_set1_epi32(x.correction));
    const __m256 scale = _mm256_mul_ps(w.scale, _mm256_set1_ps(x.scale));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), scale, sums);
  }
};

struct Avx2Values : Avx2 {
  using Block = Values;
  struct Weights {
    __m256 value[kBlock];
  };

  static INLINE Weights Unpack(const uint32_t* codes, const float* scales) {
    const __m256 table = _mm256_setr_ps(0, 128, 256, 384, 512, 768, 1024, 1536);
    const __m256 scale = _mm256_loadu_ps(scales), sign = _mm256_set1_ps(-0.0f);
    Weights w;
    for (int i = 0; i < kBlock; ++i) {
      const __m256i code = LoadInts(codes + i / 8 * kLanes);
      const __m256 magnitude =  // vpermps looks at three bits of each index
          _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(code, i % 8 * 4));
      const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28 - i % 8 * 4));
      w.value[i] = _mm256_mul_ps(_mm256_xor_ps(magnitude, _mm256_and_ps(top, sign)), scale);
    }
    return w;
  }

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
