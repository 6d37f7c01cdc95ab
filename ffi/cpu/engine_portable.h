// The engines in plain C++, for any machine.

#ifndef JAX_NVFP4_MOE_CPU_ENGINE_PORTABLE_H_
#define JAX_NVFP4_MOE_CPU_ENGINE_PORTABLE_H_

#include "products.h"
#include "scales.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// Twice the value of each code.
constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct Portable {
  static constexpr int64_t kLanes = 8, kVectors = 1;
  static constexpr bool kGemv = false, kTiles = false;
  struct Sums {
    float lane[kLanes];
  };
  struct Packed {
    uint32_t lane[kLanes];
  };

  static INLINE Sums Zero() { return {}; }
  static INLINE Sums Load(const float* from) {
    Sums sums;
    memcpy(&sums, from, sizeof sums);
    return sums;
  }
  static INLINE void Store(float* to, const Sums& sums) { memcpy(to, &sums, sizeof sums); }

  static INLINE void Transpose(const uint8_t* const* rows, int64_t offset, Packed* to) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t i = 0; i < 2 * kStep; ++i) {
        const uint8_t* const four = rows[lane] + offset + 4 * i;  // little endian on any machine
        to[i].lane[lane] =
            four[0] | four[1] << 8 | four[2] << 16 | static_cast<uint32_t>(four[3]) << 24;
      }
    }
  }

  static INLINE void DecodeScales(const uint8_t* const* rows, int64_t count, float* to) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t b = 0; b < count; ++b) to[b * kLanes + lane] = DecodeScale(rows[lane][b]);
    }
  }
};

struct PortableE2m1 : Portable {
  using Block = E2m1Block;
  using Operand = const E2m1Block&;
  struct Weights {
    int8_t code[kBlock][kLanes];  // in the order of E2m1Block::doubled, not shifted
    float scale[kLanes];
  };

  static INLINE Weights Unpack(const Packed* packed, const float* scales) {
    Weights w;
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t shift = i % 4 * 8 + i % 8 / 4 * 4;  // the even codes of 8, then the odd ones
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        w.code[i][lane] = kDoubled[packed[i / 8].lane[lane] >> shift & 15];
      }
    }
    memcpy(w.scale, scales, sizeof w.scale);
    return w;
  }

  static INLINE const E2m1Block& Broadcast(const E2m1Block& x) { return x; }

  static INLINE Sums Add(Sums sums, const Weights& w, const E2m1Block& x) {
    int32_t product[kLanes] = {};
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane)
        product[lane] += w.code[i][lane] * x.doubled[i];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums.lane[lane] += product[lane] * (w.scale[lane] * x.scale);
    }
    return sums;
  }
};

struct PortableFp32 : Portable {
  using Block = Fp32Block;
  using Operand = const Fp32Block&;
  struct Weights {
    float value[kBlock][kLanes];
  };

  static INLINE Weights Unpack(const Packed* packed, const float* scales) {
    Weights w;
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t code = packed[i / 8].lane[lane] >> (i % 8 * 4) & 15;
        w.value[i][lane] = kDoubled[code] * 128.0f * scales[lane];
      }
    }
    return w;
  }

  static INLINE const Fp32Block& Broadcast(const Fp32Block& x) { return x; }

  static INLINE Sums Add(Sums sums, const Weights& w, const Fp32Block& x) {
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane)
        sums.lane[lane] += w.value[i][lane] * x.value[i];
    }
    return sums;
  }
};

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_ENGINE_PORTABLE_H_
