// Errors: an exception with XLA's error code, and exceptions turned into XLA's errors.

#ifndef JAX_NVFP4_MOE_FAILURE_H_
#define JAX_NVFP4_MOE_FAILURE_H_

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {

using xla::ffi::ErrorCode;

// An error with a code. It never leaves the library: handlers return `CurrentError`.
class Failure : public std::runtime_error {
 public:
  Failure(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

// The exception being handled as XLA's error, its message after `prefix`. Call it in a catch block.
inline xla::ffi::Error CurrentError(const std::string& prefix) {
  try {
    throw;
  } catch (const Failure& failure) {
    return xla::ffi::Error(failure.code(), prefix + failure.what());
  } catch (const std::overflow_error& error) {  // sizes.h
    return xla::ffi::Error(ErrorCode::kInvalidArgument, prefix + error.what());
  } catch (const std::bad_alloc&) {
    return xla::ffi::Error(ErrorCode::kResourceExhausted, prefix + "out of memory");
  } catch (const std::exception& error) {
    return xla::ffi::Error(ErrorCode::kInternal, prefix + error.what());
  } catch (...) {
    return xla::ffi::Error(ErrorCode::kInternal, prefix + "an unknown exception");
  }
}

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_FAILURE_H_
