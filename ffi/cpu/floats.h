// Vectors of floats and what is computed on them, in the compilers' own notation, which they lower
// to any instruction set. Everything here is in an unnamed namespace: each level has its own.

#ifndef JAX_NVFP4_MOE_CPU_FLOATS_H_
#define JAX_NVFP4_MOE_CPU_FLOATS_H_

#include <cstdint>
#include <cstring>

#include "layer.h"

namespace jax_nvfp4_moe::cpu {
namespace {

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
// What is long, and called for many blocks at once: each copy would only have to be compiled.
#define OUTLINE __attribute__((noinline))

// As wide as the instructions are: compilers take wider vectors apart element by element.
#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif
constexpr int64_t kParts = kBlock / kWidth;  // vectors in a block

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

INLINE Floats Load(const float* from) {
  Floats v;
  memcpy(&v, from, sizeof v);
  return v;
}

INLINE void Store(float* to, const Floats& v) { memcpy(to, &v, sizeof v); }

INLINE Ints Bits(const Floats& x) { return (Ints)x; }
INLINE Floats FromBits(const Ints& bits) { return (Floats)bits; }

// The upper halves of floats: bfloat16, if nothing else is in them.
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

INLINE Floats LoadHalves(const uint16_t* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return FromBits(__builtin_convertvector(halves, Ints) << 16);
}

INLINE void StoreHalves(uint16_t* to, const Floats& x) {
  const Halves halves = __builtin_convertvector(Bits(x) >> 16, Halves);
  memcpy(to, &halves, sizeof halves);
}

INLINE Floats All(float x) { return (Floats){} + x; }
INLINE Floats Abs(const Floats& x) { return FromBits(Bits(x) & 0x7FFFFFFF); }

// A NaN in x is kept.
INLINE Floats AtMost(const Floats& x, float limit) { return x > limit ? All(limit) : x; }
INLINE Floats AtLeast(const Floats& x, float limit) { return x < limit ? All(limit) : x; }

// The largest magnitude: as integers, the bits of NaNs are above those of all other floats.
INLINE Ints MaxBits(const Ints& most, const Floats& x) {
  const Ints bits = Bits(Abs(x));
  return bits > most ? bits : most;
}

// A vector's elements combined into one: fours first, which are registers anywhere.
template <class Combine>
INLINE int32_t Combined(const Ints& x, const Combine& combine) {
  typedef int32_t Four __attribute__((vector_size(16)));
  Four fours[kWidth / 4];
  memcpy(fours, &x, sizeof x);
  Four one = fours[0];
  for (int64_t i = 1; i < kWidth / 4; ++i) one = combine(one, fours[i]);
  return combine(combine(one[0], one[1]), combine(one[2], one[3]));
}

INLINE float Largest(const Ints& bits) {
  const int32_t most = Combined(bits, [](auto a, auto b) INLINE_LAMBDA { return a > b ? a : b; });
  float x;
  memcpy(&x, &most, sizeof x);
  return x;
}

INLINE int32_t Sum(const Ints& x) {
  return Combined(x, [](auto a, auto b) INLINE_LAMBDA { return a + b; });
}

// ------------------------------------------------------------------------------------- rounding

INLINE Floats ToBfloat16(const Floats& x) {
  const Ints bits = Bits(x);
  const Ints rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & (int32_t)0xFFFF0000;
  return x != x ? x : FromBits(rounded);
}

INLINE Floats ToFloat16(const Floats& x) {
  const Ints bits = Bits(x), sign = bits & (int32_t)0x80000000;
  const Floats a = Abs(x);
  const Ints kept = (Bits(a) + 0xFFF + ((Bits(a) >> 13) & 1)) & ~0x1FFF;
  const Floats small = (a + 0.75f) - 0.75f;  // a multiple of 2**-24, the smallest subnormal
  Floats rounded = a < 0x1p-14f ? small : FromBits(kept);
  rounded = rounded > 65504.0f ? All(__builtin_inff()) : rounded;
  return x != x ? x : FromBits(Bits(rounded) | sign);
}

INLINE Floats Round(const Floats& x, Rounding to) {
  return to == Rounding::kFloat32 ? x : to == Rounding::kBfloat16 ? ToBfloat16(x) : ToFloat16(x);
}

// Of x >= 0; saturates at 448, NaN stays.
INLINE float ToE4m3(float x) {
  if (x != x) return x;
  if (x >= 448.0f) return 448.0f;
  if (x < 0x1p-6f)
    return (x + 0x1.8p14f) - 0x1.8p14f;  // a multiple of 2**-9, the smallest subnormal
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

// ------------------------------------------------------------------------------------- quantising

// jax_nvfp4_moe.rounding.reciprocal and format.scale_for.
INLINE float Reciprocal(float scale) { return 1.0f / scale; }

INLINE float ScaleFor(float amax) {
  const float scale = amax / 2688.0f;
  return amax == 0 ? 1.0f : scale < 0x1p-126f ? 0x1p-126f : scale;
}

typedef int8_t Bytes __attribute__((vector_size(kBlock)));

// In the order of E2m1Block::doubled.
INLINE Bytes Ordered(const Bytes& x) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
#else
  return __builtin_shuffle(x, (Bytes){0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15});
#endif
}

// A block at an encode scale: jax_nvfp4_moe.format.quantize_blocks.
INLINE void Quantize(const Floats* x, float encode, E2m1Block* to) {
  Ints most = {};
  for (int64_t i = 0; i < kParts; ++i) most = MaxBits(most, x[i]);
  const float largest = Largest(most);
  // The sixth of the largest; there it is the largest of the sixths, which is the same.
  const float scale = ToE4m3(encode * (largest * (1.0f / 6.0f)));
  const float step = scale == 0 ? 1.0f : scale;
  float inverse = encode / step;
  inverse = inverse > 0x1.fffffep127f ? 0x1.fffffep127f : inverse;
  typedef int8_t Part __attribute__((vector_size(kWidth)));
  typedef int16_t Twos __attribute__((vector_size(2 * kWidth)));  // on the way: GCC takes one step
  Part parts[kParts];
  Ints sum = {};
  for (int64_t i = 0; i < kParts; ++i) {
    const Floats scaled = x[i] * inverse, a = Abs(scaled);
    // What each boundary that is passed adds to the doubled value; a tie belongs to the even code.
    const Ints doubled = -((a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) +
                           2 * ((a > 2.5f) + (a >= 3.5f)) + 4 * (a > 5.0f));
    const Ints sign = Bits(scaled) >> 31;
    const Ints value = (doubled ^ sign) - sign;
    parts[i] = __builtin_convertvector(__builtin_convertvector(value, Twos), Part);
    sum += value;
  }
  Bytes bytes;
  memcpy(&bytes, parts, sizeof bytes);
  bytes = Ordered(bytes);
  memcpy(to->doubled, &bytes, sizeof bytes);
  to->correction = -kShift * Sum(sum);
  to->scale = 64 * scale;
}

// ------------------------------------------------------------------------------------- activations

// Within 2 ulp; what is below float's normal range may be zero.
INLINE Floats Exp(Floats x) {
  x = AtMost(AtLeast(x, -104.0f), 89.0f);
  const Floats shifted = x * 0x1.715476p0f + 0x1.8p23f;  // the nearest multiple of log 2
  const Ints power = Bits(shifted) - 0x4B400000;
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // log 2 in two parts
  Floats p = All(0x1.a01a02p-13f);                                // the exponential series, to r**7
  p = p * r + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints half = power >> 1;  // 2**power alone may be out of range
  return p * FromBits((half + 127) << 23) * FromBits((power - half + 127) << 23);
}

INLINE Floats Sigmoid(const Floats& x) { return 1.0f / (1.0f + Exp(-x)); }

// The error function, within 5e-7: a ratio of polynomials fitted to it.
INLINE Floats Erf(Floats x) {
  x = AtMost(AtLeast(x, -3.92f), 3.92f);
  const Floats t = x * x;
  Floats p = All(0x1.0fe48ep-19f), q = All(0x1.3d5af6p-15f);
  p = p * t + 0x1.2a8b9ap-12f;
  q = q * t + 0x1.32f7dp-10f;
  p = p * t + 0x1.f3483cp-9f;
  q = q * t + 0x1.ed64dap-7f;
  p = p * t + 0x1.b12eap-5f;
  q = q * t + 0x1.d54702p-4f;
  p = p * t + 0x1.88583cp-3f;
  q = q * t + 0x1.0197cap-1f;
  p = p * t + 0x1.20dd74p0f;
  q = q * t + 1.0f;
  return AtMost(AtLeast(x * p / q, -1.0f), 1.0f);
}

// jax_nvfp4_moe.activations.activate.
INLINE Floats Activate(Floats gate, Floats up, const Layer& layer) {
  if (layer.activation == Activation::kRelu2) {
    const Floats positive = AtLeast(up, 0.0f);
    return positive * positive;
  }
  gate = AtMost(gate, layer.limit);
  up = AtMost(AtLeast(up, -layer.limit), layer.limit);
  switch (layer.activation) {
    case Activation::kGelu:
      return gate * 0.5f * (1.0f + Erf(gate * 0x1.6a09e6p-1f)) * up;
    case Activation::kGeluTanh: {
      const Floats near = AtMost(AtLeast(gate, -10.0f), 10.0f);
      const Floats inner = 0x1.988454p-1f * (near + 0.044715f * near * near * near);
      return gate * Sigmoid(2.0f * inner) * up;  // 1 + tanh(z) is twice the sigmoid of 2z
    }
    case Activation::kSwigluOai:
      return gate * Sigmoid(layer.alpha * gate) * (up + layer.beta);
    default:
      return gate * Sigmoid(gate) * up;
  }
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_FLOATS_H_
