// The arguments of one execution of a call.

#ifndef JAX_NVFP4_MOE_CALL_ARGUMENTS_H_
#define JAX_NVFP4_MOE_CALL_ARGUMENTS_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <cstddef>
#include <vector>

#include "call_site.h"
#include "tensors.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {

// What a function is called with, and its workspace: XLA's buffers as tensors on `device`.
class CallArguments {
 public:
  // The last of `rets` is the workspace. `site` is resolved, and outlives this.
  //
  // Throws Failure: XLA has no operand or result of an argument's number, or DLPack lacks its type.
  CallArguments(const CallSite& site, DLDevice device, const xla::ffi::RemainingArgs& args,
                const xla::ffi::RemainingRets& rets);
  CallArguments(const CallArguments&) = delete;
  CallArguments& operator=(const CallArguments&) = delete;

  // One for each of the site's arguments, in their order.
  const std::vector<TVMFFIAny>& values() const { return values_; }
  DLTensor& workspace() { return *workspace_; }
  size_t workspace_bytes() const { return workspace_bytes_; }

 private:
  Tensors tensors_;
  std::vector<TVMFFIAny> values_;
  DLTensor* workspace_;
  size_t workspace_bytes_;
};

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_CALL_ARGUMENTS_H_
