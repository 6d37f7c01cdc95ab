// The engines of x86 (products.h): one for each type of activation blocks, over a vector's
// instructions (vector_x86.h).

#ifndef JAX_NVFP4_MOE_CPU_ENGINE_X86_H_
#define JAX_NVFP4_MOE_CPU_ENGINE_X86_H_

#include "gemv.h"
#include "vector_x86.h"

namespace jax_nvfp4_moe::cpu {
namespace {

template <class Vector>
struct EngineX86 : Vector {
  static constexpr int64_t kVectors = 4;
  static constexpr bool kGemv = false, kTiles = false;
};

// Each lane holds a block: of as many rows, or of one row (gemv.h).
template <class Vector>
struct E2m1Engine : EngineX86<Vector> {
  using typename Vector::Packed;
  using typename Vector::Sums;
  static constexpr bool kGemv = true;
  using Block = E2m1Block;
  struct Weights {
    Packed code[4];  // shifted values, in the order of E2m1Block::doubled
    Sums scale;
  };
  struct Operand {
    Packed code[4];  // E2m1Block::doubled
    Packed correction;
    Sums scale;
  };

  static INLINE Weights Decoded(const Packed* packed, Sums scale) {
    Weights w;
    for (int i = 0; i < 2; ++i) {
      w.code[2 * i] = Vector::Lookup(ShiftedValues(), Vector::LowNibbles(packed[i]));
      w.code[2 * i + 1] =
          Vector::Lookup(ShiftedValues(), Vector::LowNibbles(Vector::OddCodes(packed[i])));
    }
    w.scale = scale;
    return w;
  }

  static INLINE Weights Unpack(const Packed* packed, const float* scales) {
    return Decoded(packed, Vector::Load(scales));
  }

  static INLINE Operand Broadcast(const E2m1Block& x) {
    const auto four = [&](int i) INLINE_LAMBDA {
      int32_t bits;
      memcpy(&bits, x.doubled + 4 * i, sizeof bits);
      return Vector::AllBits(bits);
    };
    return {{four(0), four(1), four(2), four(3)},
            Vector::AllBits(x.correction),
            Vector::All(x.scale)};
  }

  static INLINE Sums Add(Sums sums, const Weights& w, const Operand& x) {
    const Sums product = Vector::FromInts(Vector::Dot(x.correction, w.code, x.code));
    return Vector::Fma(product, Vector::Multiply(w.scale, x.scale), sums);
  }

  // kLanes blocks of one token, in the order of `BlockOf`.
  static INLINE Operand Gather(const E2m1Block* x) {
    constexpr int64_t kLanes = Vector::kLanes;
    const Packed a = Vector::EveryOther(x), b = Vector::EveryOther(x + 1);
    const Packed c = Vector::EveryOther(x + kLanes / 2), d = Vector::EveryOther(x + kLanes / 2 + 1);
    const Packed low[2] = {Vector::LowDwords(a, b), Vector::LowDwords(c, d)};
    const Packed high[2] = {Vector::HighDwords(a, b), Vector::HighDwords(c, d)};
    const auto correction = [&](int64_t lane) INLINE_LAMBDA {
      return x[BlockOf<kLanes>(lane)].correction;
    };
    const auto scale = [&](int64_t lane) INLINE_LAMBDA {
      int32_t bits;
      memcpy(&bits, &x[BlockOf<kLanes>(lane)].scale, sizeof bits);
      return bits;
    };
    return {{Vector::LowQwords(low[0], low[1]), Vector::HighQwords(low[0], low[1]),
             Vector::LowQwords(high[0], high[1]), Vector::HighQwords(high[0], high[1])},
            Vector::FromLanes(correction),
            (Sums)Vector::FromLanes(scale)};
  }

  // kLanes blocks of one row of weights, in the same order.
  static INLINE Weights Decode(const uint8_t* codes, const uint8_t* scales) {
    Packed packed[2];
    Vector::LoadCodes(codes, packed);
    return Decoded(packed, Vector::LoadScales(scales));
  }
};

template <class Vector>
struct Fp32Engine : EngineX86<Vector> {
  using typename Vector::Packed;
  using typename Vector::Sums;
  using Block = Fp32Block;
  using Operand = const Fp32Block&;
  struct Weights {
    Sums value[kBlock];
  };

  static INLINE Weights Unpack(const Packed* packed, const float* scales) {
    const Sums scale = Vector::Load(scales);
    Weights w;
    for (int i = 0; i < kBlock; ++i) w.value[i] = Vector::Value(packed, i, scale);
    return w;
  }

  static INLINE const Fp32Block& Broadcast(const Fp32Block& x) { return x; }

  static INLINE Sums Add(Sums sums, const Weights& w, const Fp32Block& x) {
    for (int i = 0; i < kBlock; ++i) {
      sums = Vector::Fma(w.value[i], Vector::All(x.value[i]), sums);
    }
    return sums;
  }
};

#if defined(__AVX512BF16__)

struct Bf16Engine : EngineX86<Vector512> {
  using Block = Bf16Block;
  using Operand = const Bf16Block&;
  struct Weights {
    __m512i pair[kBlock / 2];
  };

  // Two neighbouring elements of a block in each row, in bfloat16, the first in the lower half.
  // Both have at most six significant bits.
  static INLINE __m512i Pair(const __m512i* packed, int pair, __m512 scale) {
    const __m512i even = _mm512_castps_si512(Value(packed, 2 * pair, scale));
    const __m512i odd = _mm512_castps_si512(Value(packed, 2 * pair + 1, scale));
    const __m512i upper = _mm512_and_si512(odd, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), upper);
  }

  static INLINE Weights Unpack(const __m512i* packed, const float* scales) {
    const __m512 scale = Load(scales);
    Weights w;
    for (int i = 0; i < kBlock / 2; ++i) w.pair[i] = Pair(packed, i, scale);
    return w;
  }

  static INLINE const Bf16Block& Broadcast(const Bf16Block& x) { return x; }

  static INLINE Sums Add(Sums sums, const Weights& w, const Bf16Block& x) {
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

#endif  // JAX_NVFP4_MOE_CPU_ENGINE_X86_H_
