#include "tensors.h"

#include "failure.h"
#include "sizes.h"

namespace jax_nvfp4_moe {
namespace {

namespace ffi = xla::ffi;

DLDataType DataTypeOf(ffi::DataType dtype, const std::string& name) {
  switch (dtype) {
    case ffi::DataType::PRED:
      return {kDLBool, 8, 1};
    case ffi::DataType::S8:
      return {kDLInt, 8, 1};
    case ffi::DataType::S16:
      return {kDLInt, 16, 1};
    case ffi::DataType::S32:
      return {kDLInt, 32, 1};
    case ffi::DataType::S64:
      return {kDLInt, 64, 1};
    case ffi::DataType::U8:
      return {kDLUInt, 8, 1};
    case ffi::DataType::U16:
      return {kDLUInt, 16, 1};
    case ffi::DataType::U32:
      return {kDLUInt, 32, 1};
    case ffi::DataType::U64:
      return {kDLUInt, 64, 1};
    case ffi::DataType::F16:
      return {kDLFloat, 16, 1};
    case ffi::DataType::F32:
      return {kDLFloat, 32, 1};
    case ffi::DataType::F64:
      return {kDLFloat, 64, 1};
    case ffi::DataType::BF16:
      return {kDLBfloat, 16, 1};
    case ffi::DataType::F8E4M3FN:
      return {kDLFloat8_e4m3fn, 8, 1};
    case ffi::DataType::F8E5M2:
      return {kDLFloat8_e5m2, 8, 1};
    case ffi::DataType::F8E8M0FNU:
      return {kDLFloat8_e8m0fnu, 8, 1};
    case ffi::DataType::F4E2M1FN:
      return {kDLFloat4_e2m1fn, 4, 1};
    default:
      throw Failure(ErrorCode::kInvalidArgument,
                    name + " has XLA's data type " + std::to_string(static_cast<int>(dtype)) +
                        ", which DLPack does not have");
  }
}

}  // namespace

void WriteStrides(const int64_t* shape, size_t rank, int64_t* strides) {
  int64_t stride = 1;
  for (size_t i = rank; i-- > 0;) {
    strides[i] = stride;
    if (i > 0) stride = Product(stride, shape[i]);
  }
}

DLTensor* Tensors::Add(const ffi::AnyBuffer& buffer, const std::string& name, DLDevice device) {
  const auto shape = buffer.dimensions();
  const size_t start = strides_.size();
  strides_.resize(start + shape.size());
  WriteStrides(shape.begin(), shape.size(), strides_.data() + start);
  tensors_.push_back(DLTensor{buffer.untyped_data(), device, static_cast<int32_t>(shape.size()),
                              DataTypeOf(buffer.element_type(), name),
                              const_cast<int64_t*>(shape.begin()), strides_.data() + start,
                              /*byte_offset=*/0});
  return &tensors_.back();
}

}  // namespace jax_nvfp4_moe
