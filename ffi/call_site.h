// A call in an XLA program: the function, and the list of arguments that its attributes describe.

#ifndef JAX_NVFP4_MOE_CALL_SITE_H_
#define JAX_NVFP4_MOE_CALL_SITE_H_

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "modules.h"
#include "program.h"
#include "tvm_ffi.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {

// XLA makes one for each call when it builds an executable, and keeps it as the call's state.
struct CallSite {
  static xla::ffi::TypeId id;

  // From the attributes.
  std::string module;
  std::string function;
  std::vector<Argument> arguments;

  // From `Resolve`.
  Module* home = nullptr;
  TVMFFISafeCallType callee = nullptr;
  std::vector<TVMFFIObject*> lists;  // of the IntList arguments, in their order

  // Devices whose kernels `LoadKernels` has loaded.
  std::mutex loaded_mutex;
  std::set<int> loaded;

  CallSite() = default;
  ~CallSite();
  CallSite(const CallSite&) = delete;
  CallSite& operator=(const CallSite&) = delete;

  // Opens the module and finds the function, once. Throws Failure; the next call then tries again.
  void Resolve();

 private:
  std::once_flag resolved_;
};

// Makes a call site from the attributes `module`, `function`, `program` and `arguments`.
xla::ffi::ErrorOr<std::unique_ptr<CallSite>> MakeCallSite(xla::ffi::Dictionary attributes);

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_CALL_SITE_H_
