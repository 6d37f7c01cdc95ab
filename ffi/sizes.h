// Arithmetic on sizes that throws where 64 bits do not hold the result.

#ifndef JAX_NVFP4_MOE_SIZES_H_
#define JAX_NVFP4_MOE_SIZES_H_

#include <cstdint>
#include <stdexcept>
#include <string>

namespace jax_nvfp4_moe {

// The product of sizes. Throws std::overflow_error.
inline int64_t Product(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw std::overflow_error("a size overflows 64 bits: " + std::to_string(a) + " * " +
                              std::to_string(b));
  }
  return product;
}

template <typename... Rest>
int64_t Product(int64_t a, int64_t b, Rest... rest) {
  return Product(Product(a, b), rest...);
}

// The sum of sizes. Throws std::overflow_error.
inline int64_t Sum(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) {
    throw std::overflow_error("a size overflows 64 bits: " + std::to_string(a) + " + " +
                              std::to_string(b));
  }
  return sum;
}

// The least multiple of `unit` that is not below `size`. Throws std::overflow_error.
inline int64_t RoundUp(int64_t size, int64_t unit) { return Sum(size, unit - 1) / unit * unit; }

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_SIZES_H_
