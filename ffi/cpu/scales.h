// One E4M3 scale.

#ifndef JAX_NVFP4_MOE_CPU_SCALES_H_
#define JAX_NVFP4_MOE_CPU_SCALES_H_

#include "floats.h"

namespace jax_nvfp4_moe::cpu {
namespace {

// An E4M3 scale times 2**-8, which is what float16's instructions make of its bits.
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

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_SCALES_H_
