// Compiled modules, such as FlashInfer's, and the functions in them.
//
// Python registers a module by name and path, from a manifest; it is opened when a call first needs
// it. Names, not paths, stand in programs, which may run on another machine than they were made on.

#ifndef JAX_NVFP4_MOE_MODULES_H_
#define JAX_NVFP4_MOE_MODULES_H_

#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "tvm_ffi.h"

namespace jax_nvfp4_moe {

// What the bridge needs of the CUDA runtime, from whichever one a module is linked to; all null where
// it is linked to none. Types are those of cuda_runtime_api.h, with enums and handles as the ABI has
// them, so that no CUDA headers are needed.
struct Cuda {
  int (*get_device)(int*);
  int (*set_device)(int);
  int (*stream_create_with_flags)(void** stream, unsigned flags);
  int (*stream_destroy)(void* stream);
  int (*stream_begin_capture)(void* stream, int mode);
  int (*stream_end_capture)(void* stream, void** graph);
  int (*graph_destroy)(void* graph);
  const char* (*get_error_string)(int);
};

class Module {
 public:
  // Images that the module asks for by a relative path are read from `cubins`; "" means none are.
  Module(std::string name, std::string path, std::string tvm_ffi, std::string cubins);

  // The module that was registered under a name. Throws Failure if there is none.
  static Module& Find(const std::string& name);

  // Opens it, once. Throws Failure if it cannot be opened.
  void Open();

  const std::string& name() const { return name_; }
  const TvmFfi& tvm_ffi() const { return *tvm_ffi_; }
  const Cuda& cuda() const { return cuda_; }

  // A function by the name that it was exported with.
  TVMFFISafeCallType Function(const std::string& function) const;

  // Kernels are loaded under the exclusive lock and launched under the shared one: FlashInfer keeps
  // its images in a map without a lock of its own.
  std::shared_mutex& kernels() { return kernels_; }

  // Makes this thread's requests for images those of this module, while it lives.
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

// Registers a module; the same name again must come with the same paths. Throws Failure otherwise.
void Register(const std::string& name, const std::string& path, const std::string& tvm_ffi,
              const std::string& cubins);

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_MODULES_H_
