// Products in plain C++: what the other engines compute, as it reads without their instructions.

#ifndef JAX_NVFP4_MOE_CPU_ENGINE_PORTABLE_H_
#define JAX_NVFP4_MOE_CPU_ENGINE_PORTABLE_H_

#include "products.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// Twice the value of each code.
constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// An E4M3 scale times 2**-8, as the instructions for float16 have it.
INLINE float DecodeScale(uint8_t bits) {
  const int32_t exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7F) == 0x7F) return __builtin_nanf("");
  float value = exponent == 0 ? mantissa * 0x1p-17f : 0.0f;
  if (exponent != 0) {
    const uint32_t single = static_cast<uint32_t>(exponent - 7 - 8 + 127) << 23 | mantissa << 20;
    memcpy(&value, &single, sizeof value);
  }
  return bits & 0x80 ? -value : value;
}

struct Portable {
  static constexpr int64_t kLanes = 8;
  struct Sums {
    float lane[kLanes];
  };

  static INLINE Sums Zero() { return {}; }
  static INLINE Sums LoadSums(const float* from) {
    Sums sums;
    memcpy(&sums, from, sizeof sums);
    return sums;
  }
  static INLINE void StoreSums(float* to, const Sums& sums) { memcpy(to, &sums, sizeof sums); }

  static INLINE void Transpose(const uint8_t* const* rows, int64_t count, uint32_t* to) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t i = 0; i < 2 * count; ++i) memcpy(to + i * kLanes + lane, rows[lane] + 4 * i, 4);
    }
  }

  static INLINE void DecodeScales(const uint8_t* const* rows, int64_t count, float* to) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t b = 0; b < count; ++b) to[b * kLanes + lane] = DecodeScale(rows[lane][b]);
    }
  }
};

struct PortableCodes : Portable {
  using Block = Codes;
  struct Weights {
    int8_t code[kBlock][kLanes];  // in the order of Codes::code
    float scale[kLanes];
  };

  static INLINE Weights Unpack(const uint32_t* codes, const float* scales) {
    Weights w;
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t shift = i % 4 * 8 + i % 8 / 4 * 4;  // the even codes of 8, then the odd ones
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        w.code[i][lane] = kDoubled[codes[i / 8 * kLanes + lane] >> shift & 15];
      }
    }
    memcpy(w.scale, scales, sizeof w.scale);
    return w;
  }

  static INLINE Sums Add(Sums sums, const Weights& w, const Codes& x) {
    int32_t product[kLanes] = {};
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane) product[lane] += w.code[i][lane] * x.code[i];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums.lane[lane] += product[lane] * (w.scale[lane] * x.scale);
    }
    return sums;
  }
};

struct PortableValues : Portable {
  using Block = Values;
  struct Weights {
    float value[kBlock][kLanes];
  };

  static INLINE Weights Unpack(const uint32_t* codes, const float* scales) {
    Weights w;
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t code = codes[i / 8 * kLanes + lane] >> (i % 8 * 4) & 15;
        w.value[i][lane] = kDoubled[code] * 128.0f * scales[lane];
      }
    }
    return w;
  }

  static INLINE Sums Add(Sums sums, const Weights& w, const Values& x) {
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums.lane[lane] += w.value[i][lane] * x.value[i];
    }
    return sums;
  }
};

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_ENGINE_PORTABLE_H_
