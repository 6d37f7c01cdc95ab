// Compiled modules, such as FlashInfer's, and the functions in them.
//
// Python registers a module by name and path, from a manifest. The first call that needs it opens
// it. Programs contain the name, not the path, because they may run on another machine.

#ifndef JAX_NVFP4_MOE_MODULES_H_
#define JAX_NVFP4_MOE_MODULES_H_

#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "tvm_ffi.h"

namespace jax_nvfp4_moe {

class Module {
 public:
  // The module's kernel images are read from the directory `cubins`; "" if it has none.
  Module(std::string name, std::string path, std::string tvm_ffi, std::string cubins);

  // The module registered under a name. Throws Failure if there is none.
  static Module& Find(const std::string& name);

  // Opens the module, once. Throws Failure if that fails; the next call then tries again.
  void Open();

  const std::string& name() const { return name_; }
  const TvmFfi& tvm_ffi() const { return *tvm_ffi_; }
  const Cuda& cuda() const { return cuda_; }

  // An exported function. Throws Failure if there is none of that name.
  TVMFFISafeCallType Function(const std::string& function) const;

  // Kernels are loaded under the exclusive lock and launched under the shared one: FlashInfer's own
  // map of loaded images has no lock.
  std::shared_mutex& kernels() { return kernels_; }

  // Serves this thread's requests for kernel images from this module, until the end of the scope.
  class Current {
   public:
    explicit Current(Module& module);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    Module* outer_;
  };

 private:
  static void LoadCubin(const char* path, const char* sha256);

  std::string name_, path_, tvm_ffi_path_, cubins_;
  std::once_flag opened_;
  void* library_ = nullptr;
  const TvmFfi* tvm_ffi_ = nullptr;
  Cuda cuda_ = {};
  void (*set_current_cubin_)(const char*, int) = nullptr;
  std::shared_mutex kernels_;
};

// Registers a module. Throws Failure if the name is registered already with other paths.
void Register(const std::string& name, const std::string& path, const std::string& tvm_ffi,
              const std::string& cubins);

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_MODULES_H_
