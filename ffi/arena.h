// Memory for the tensors that a function allocates, inside a buffer that XLA owns.
//
// XLA's scratch memory is unsuitable: under CUDA graphs its address is frozen into the graph, while
// XLA gives the memory to other calls. A result lives until the last kernel in the queue has run.

#ifndef JAX_NVFP4_MOE_ARENA_H_
#define JAX_NVFP4_MOE_ARENA_H_

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace jax_nvfp4_moe {

class Arena {
 public:
  // The alignment of cudaMalloc and of XLA's buffers.
  static constexpr int64_t kAlignment = 256;

  // Serves this thread's `Allocate` until it is destroyed.
  Arena(void* base, size_t size, DLDevice device);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The number of tensors that are not released yet.
  int live() const { return *live_; }

  // TVM-FFI's allocator: places tensors one after the other, and reuses no memory.
  //
  // A C callback, so it throws nothing. It returns -1 and calls `set_error` with MemoryError (the
  // message has the bytes needed so far and the bytes there are), ValueError (a shape that is no
  // shape, or whose bytes overflow 64 bits) or RuntimeError (no call is running on this thread).
  static int Allocate(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_context,
                      void (*set_error)(void* context, const char* kind, const char* message));

 private:
  struct Node;

  DLManagedTensorVersioned* Place(const DLTensor& prototype);

  char* base_;
  size_t size_;
  int64_t used_ = 0;
  // Shared with the tensors, which a faulty callee may release later than it should.
  std::shared_ptr<int> live_ = std::make_shared<int>(0);
  DLDevice device_;
  Arena* outer_;
};

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_ARENA_H_
