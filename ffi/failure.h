// The one exception of this library: what went wrong, as XLA's code and a message.

#ifndef JAX_NVFP4_MOE_FAILURE_H_
#define JAX_NVFP4_MOE_FAILURE_H_

#include <stdexcept>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {

using xla::ffi::ErrorCode;

// Thrown inside, caught where XLA calls in (call.cc).
class Failure : public std::runtime_error {
 public:
  Failure(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_FAILURE_H_
