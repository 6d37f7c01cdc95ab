// Memory for the tensors that a callee allocates, inside a buffer that XLA owns.
//
// XLA's scratch memory would not do: under CUDA graphs its address is frozen into the graph and given
// to someone else. A result of the call lives until the last kernel that was queued has run.

#ifndef JAX_NVFP4_MOE_ARENA_H_
#define JAX_NVFP4_MOE_ARENA_H_

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace jax_nvfp4_moe {

// Writes the strides of a contiguous tensor: DLPack 1.2 wants them written out.
void WriteStrides(const int64_t* shape, size_t rank, int64_t* strides);

class Arena {
 public:
  // What cudaMalloc's and XLA's buffers are aligned to.
  static constexpr size_t kAlignment = 256;

  // Serves this thread's `Allocate` until it is destroyed.
  Arena(void* base, size_t size, DLDevice device);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Tensors that were not released yet.
  int live() const { return *live_; }

  // TVM-FFI's allocator: tensors one after the other, none given back. MemoryError with the bytes
  // needed so far and the bytes there are.
  static int Allocate(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_context,
                      void (*set_error)(void* context, const char* kind, const char* message));

 private:
  struct Node;

  char* base_;
  size_t size_;
  size_t used_ = 0;
  // Shared with the tensors, which a faulty callee may release later than it should.
  std::shared_ptr<int> live_ = std::make_shared<int>(0);
  DLDevice device_;
  Arena* outer_;
};

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_ARENA_H_
