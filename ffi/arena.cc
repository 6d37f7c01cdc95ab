#include "arena.h"

#include <string>
#include <vector>

namespace jax_nvfp4_moe {
namespace {

thread_local Arena* current = nullptr;

}  // namespace

void WriteStrides(const int64_t* shape, size_t rank, int64_t* strides) {
  int64_t stride = 1;
  for (size_t i = rank; i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
}

// A tensor with a shape of its own: the callee may free the prototype's.
struct Arena::Node {
  DLManagedTensorVersioned managed;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::shared_ptr<int> live;
};

Arena::Arena(void* base, size_t size, DLDevice device)
    : base_(static_cast<char*>(base)), size_(size), device_(device), outer_(current) {
  current = this;
}

Arena::~Arena() { current = outer_; }

int Arena::Allocate(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_context,
                    void (*set_error)(void*, const char*, const char*)) {
  Arena* arena = current;
  if (arena == nullptr) {
    set_error(error_context, "RuntimeError", "a tensor was allocated outside of a call");
    return -1;
  }
  uint64_t elements = 1;
  for (int i = 0; i < prototype->ndim; ++i) elements *= static_cast<uint64_t>(prototype->shape[i]);
  const uint64_t bits = uint64_t{prototype->dtype.bits} * prototype->dtype.lanes;
  const size_t bytes = (elements * bits + 7) / 8;
  const size_t start = (arena->used_ + kAlignment - 1) / kAlignment * kAlignment;
  if (start + bytes > arena->size_) {
    const std::string message = "the workspace has " + std::to_string(arena->size_) +
                                " bytes, and at least " + std::to_string(start + bytes) +
                                " are needed";
    set_error(error_context, "MemoryError", message.c_str());
    return -1;
  }
  arena->used_ = start + bytes;

  Node* node = new Node{};
  node->live = arena->live_;
  ++*node->live;
  node->shape.assign(prototype->shape, prototype->shape + prototype->ndim);
  node->strides.resize(node->shape.size());
  WriteStrides(node->shape.data(), node->shape.size(), node->strides.data());
  node->managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  node->managed.manager_ctx = node;
  node->managed.deleter = [](DLManagedTensorVersioned* self) {
    Node* owner = static_cast<Node*>(self->manager_ctx);
    --*owner->live;
    delete owner;
  };
  node->managed.dl_tensor = DLTensor{arena->base_ + start,
                                     arena->device_,
                                     prototype->ndim,
                                     prototype->dtype,
                                     node->shape.data(),
                                     node->strides.data(),
                                     /*byte_offset=*/0};
  *out = &node->managed;
  return 0;
}

}  // namespace jax_nvfp4_moe
