// XLA's operands as the kernels take them. Everything that protects memory is checked here.

#ifndef JAX_NVFP4_MOE_CPU_OPERANDS_H_
#define JAX_NVFP4_MOE_CPU_OPERANDS_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "layer.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe::cpu {

using FloatBuffer = xla::ffi::Buffer<xla::ffi::F32>;
using IntBuffer = xla::ffi::Buffer<xla::ffi::S32>;
using ByteBuffer = xla::ffi::Buffer<xla::ffi::U8>;
using AnyBuffer = xla::ffi::AnyBuffer;
using Shape = xla::ffi::Span<const int64_t>;

// All functions here throw Failure with INVALID_ARGUMENT, and std::overflow_error.

[[noreturn]] void Refuse(const std::string& message);

// Checks the number of axes; `expected` describes them, as in "[T, H]".
void ExpectRank(const char* name, Shape shape, size_t rank, const char* expected);

// Checks the whole shape; `axes` describes it.
void ExpectShape(const char* name, Shape shape, std::initializer_list<int64_t> expected,
                 const char* axes);

// Checks a size that is split into blocks: positive, and a multiple of 16.
void ExpectBlocks(const char* name, int64_t size);

// The enumerator at the place of `value` among `names`.
template <class Enum, size_t n>
Enum Parse(const char* name, std::string_view value, const std::string_view (&names)[n]) {
  std::string known;
  for (size_t i = 0; i < n; ++i) {
    if (value == names[i]) return static_cast<Enum>(i);
    known += (i == 0 ? "'" : ", '") + std::string(names[i]) + "'";
  }
  Refuse(std::string(name) + " is '" + std::string(value) + "'; this version knows " + known);
}

// The only element of a buffer of shape [].
float Scalar(const char* name, const FloatBuffer& buffer);

// Elements of float32 or bfloat16.
Elements ElementsOf(const char* name, const AnyBuffer& buffer);

// The elements, or null if the shape is [0], which stands for an absent array.
const float* OptionalArray(const char* name, const FloatBuffer& buffer,
                           std::initializer_list<int64_t> expected, const char* axes);

// Weights of `experts` experts. `rows` and `columns` are the logical sizes; the buffers may be
// padded. `order` of shape [0] means that each row is stored where it belongs.
Matrix MatrixOf(const char* name, const ByteBuffer& codes, const AnyBuffer& scales,
                const IntBuffer& order, int64_t experts, int64_t rows, int64_t columns,
                bool swizzled);

}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_OPERANDS_H_
