// libtvm_ffi, opened at run time: the package imports and computes without it.
//
// Types are those of apache-tvm-ffi's C headers; no function of theirs is linked.

#ifndef JAX_NVFP4_MOE_TVM_FFI_H_
#define JAX_NVFP4_MOE_TVM_FFI_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "failure.h"

namespace jax_nvfp4_moe {

// The functions that are called, by their names in the library.
struct TvmFfi {
  decltype(&TVMFFIObjectDecRef) object_dec_ref;
  decltype(&TVMFFIFunctionGetGlobal) function_get_global;
  decltype(&TVMFFIFunctionCall) function_call;
  decltype(&TVMFFIErrorMoveFromRaised) error_move_from_raised;
  decltype(&TVMFFIEnvSetStream) env_set_stream;
  decltype(&TVMFFIEnvSetDLPackManagedTensorAllocator) env_set_allocator;

  // Opens the library, globally: modules link to none and take what is there. Once a process: two
  // copies would have two sets of thread-local streams and allocators.
  static const TvmFfi& Open(const std::string& path);

  // The error that a call left behind, as XLA's.
  Failure Raised() const;

  // An ffi.Array of integers, to be released by the caller.
  TVMFFIObject* IntArray(const std::vector<int64_t>& values) const;
};

// This thread's stream and allocator for as long as it lives; then what they were before.
class Environment {
 public:
  Environment(const TvmFfi& tvm_ffi, DLDevice device, void* stream,
              DLPackManagedTensorAllocator allocator);
  ~Environment();
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const TvmFfi& tvm_ffi_;
  DLDevice device_;
  void* stream_ = nullptr;
  DLPackManagedTensorAllocator allocator_ = nullptr;
};

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_TVM_FFI_H_
