// XLA's buffers as DLPack tensors.

#ifndef JAX_NVFP4_MOE_TENSORS_H_
#define JAX_NVFP4_MOE_TENSORS_H_

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {

// Writes the strides of a contiguous tensor: DLPack 1.2 requires them.
//
// Throws std::overflow_error.
void WriteStrides(const int64_t* shape, size_t rank, int64_t* strides);

// Tensors that share the memory and the shapes of XLA's buffers, and own their strides.
class Tensors {
 public:
  // Room for `count` tensors of `dimensions` dimensions altogether. Neither can grow: `Add` returns
  // pointers.
  Tensors(size_t count, size_t dimensions) {
    tensors_.reserve(count);
    strides_.reserve(dimensions);
  }

  // Throws Failure, with `name`: DLPack lacks the buffer's data type.
  DLTensor* Add(const xla::ffi::AnyBuffer& buffer, const std::string& name, DLDevice device);

 private:
  std::vector<DLTensor> tensors_;
  std::vector<int64_t> strides_;
};

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_TENSORS_H_
