// The CUDA runtime that a module is linked to: its functions, and two scopes that use them.

#ifndef JAX_NVFP4_MOE_CUDA_RUNTIME_H_
#define JAX_NVFP4_MOE_CUDA_RUNTIME_H_

namespace jax_nvfp4_moe {

// Functions of the runtime; all null where a module is linked to none. Their types are those of
// cuda_runtime_api.h, with enums and handles as the ABI passes them: no CUDA headers are needed.
struct Cuda {
  int (*get_device)(int*);
  int (*set_device)(int);
  int (*stream_create_with_flags)(void** stream, unsigned flags);
  int (*stream_destroy)(void* stream);
  int (*stream_begin_capture)(void* stream, int mode);
  int (*stream_end_capture)(void* stream, void** graph);
  int (*graph_destroy)(void* graph);
  const char* (*get_error_string)(int);

  // Those of a library, or of the libraries that it is linked to.
  static Cuda Of(void* library);
};

// Makes a device the current one until the end of the scope.
class CurrentDevice {
 public:
  // Throws Failure: there is no such device.
  CurrentDevice(const Cuda& cuda, int ordinal);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  const Cuda& cuda_;
  int previous_ = 0;
  bool changed_ = false;
};

// A stream whose work is recorded into a graph, and discarded at the end of the scope.
class DiscardedCapture {
 public:
  // Throws Failure.
  explicit DiscardedCapture(const Cuda& cuda);
  ~DiscardedCapture();
  DiscardedCapture(const DiscardedCapture&) = delete;
  DiscardedCapture& operator=(const DiscardedCapture&) = delete;

  void* stream() const { return stream_; }

 private:
  const Cuda& cuda_;
  void* stream_ = nullptr;
};

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_CUDA_RUNTIME_H_
