#include "operands.h"

#include <algorithm>

#include "../failure.h"

namespace jax_nvfp4_moe::cpu {
namespace {

std::string Text(Shape shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

std::string Text(std::initializer_list<int64_t> shape) {
  return Text(Shape(shape.begin(), shape.size()));
}

bool Equal(Shape shape, std::initializer_list<int64_t> expected) {
  return std::equal(shape.begin(), shape.end(), expected.begin(), expected.end());
}

}  // namespace

void Refuse(const std::string& message) {
  throw Failure(ErrorCode::kInvalidArgument, message);
}

void ExpectRank(const char* name, Shape shape, size_t rank, const char* expected) {
  if (shape.size() == rank) return;
  Refuse(std::string(name) + " has the shape " + Text(shape) + "; expected " + expected);
}

void ExpectShape(const char* name, Shape shape, std::initializer_list<int64_t> expected,
                 const char* axes) {
  if (Equal(shape, expected)) return;
  Refuse(std::string(name) + " has the shape " + Text(shape) + "; expected " + axes + " = " +
         Text(expected));
}

void ExpectBlocks(const char* name, int64_t size) {
  if (size > 0 && size % kBlock == 0) return;
  Refuse(std::string(name) + " is " + std::to_string(size) +
         "; expected a positive multiple of 16");
}

float Scalar(const char* name, const FloatBuffer& buffer) {
  ExpectShape(name, buffer.dimensions(), {}, "a scalar");
  return buffer.typed_data()[0];
}

Elements ElementsOf(const char* name, const AnyBuffer& buffer) {
  const bool bf16 = buffer.element_type() == xla::ffi::DataType::BF16;
  if (!bf16 && buffer.element_type() != xla::ffi::DataType::F32) {
    Refuse(std::string(name) + " has XLA's data type " +
           std::to_string(static_cast<int>(buffer.element_type())) +
           "; expected float32 or bfloat16");
  }
  return {buffer.untyped_data(), bf16};
}

const float* OptionalArray(const char* name, const FloatBuffer& buffer,
                           std::initializer_list<int64_t> expected, const char* axes) {
  if (Equal(buffer.dimensions(), {0})) return nullptr;
  ExpectShape(name, buffer.dimensions(), expected, axes);
  return buffer.typed_data();
}

Matrix MatrixOf(const char* name, const ByteBuffer& codes, const AnyBuffer& scales,
                const IntBuffer& order, int64_t experts, int64_t rows, int64_t columns,
                bool swizzled) {
  const std::string weights = name;
  const Shape stored = codes.dimensions(), stored_scales = scales.dimensions();
  if (scales.element_type() != xla::ffi::DataType::F8E4M3FN) {
    Refuse(weights + "'s scales have XLA's data type " +
           std::to_string(static_cast<int>(scales.element_type())) + "; expected float8_e4m3fn");
  }
  if (stored.size() != 3 || stored_scales.size() != 3 || stored[0] != experts ||
      stored_scales[0] != experts || stored[1] < rows || stored_scales[1] != stored[1] ||
      stored[2] < columns / 2 || stored_scales[2] < columns / kBlock) {
    Refuse(weights + "'s codes have the shape " + Text(stored) + " and its scales " +
           Text(stored_scales) + "; expected at least " + Text({experts, rows, columns / 2}) +
           " and " + Text({experts, rows, columns / kBlock}) + ", and the same rows in both");
  }
  if (swizzled && (stored_scales[1] % 128 != 0 || stored_scales[2] % 4 != 0)) {
    Refuse(weights + "'s swizzled scales have the shape " + Text(stored_scales) +
           "; expected whole tiles of 128 x 4");
  }
  Matrix matrix = {};
  matrix.codes = codes.typed_data();
  matrix.scales = reinterpret_cast<const uint8_t*>(scales.untyped_data());
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.stored_rows = stored[1];
  matrix.code_stride = stored[2];
  matrix.scale_stride = stored_scales[2];
  matrix.swizzled = swizzled;
  if (Equal(order.dimensions(), {0})) return matrix;

  matrix.order = order.typed_data();
  if (order.dimensions().size() != 1 || order.dimensions()[0] < rows) {
    Refuse(weights + "'s row order has the shape " + Text(order.dimensions()) +
           "; expected at least " + Text({rows}));
  }
  const auto [least, most] = std::minmax_element(matrix.order, matrix.order + rows);
  if (*least < 0 || *most >= matrix.stored_rows) {
    Refuse(weights + "'s row order has rows from " + std::to_string(*least) + " to " +
           std::to_string(*most) + "; " + std::to_string(matrix.stored_rows) + " rows are stored");
  }
  return matrix;
}

}  // namespace jax_nvfp4_moe::cpu
