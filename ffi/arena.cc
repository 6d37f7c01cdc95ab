#include "arena.h"

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "sizes.h"
#include "tensors.h"

namespace jax_nvfp4_moe {
namespace {

thread_local Arena* current_arena = nullptr;

// An allocation that does not fit.
struct TooLarge : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string ShapeText(const DLTensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.ndim; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.shape[i]);
  }
  return text + "]";
}

// The bytes of a contiguous tensor, whole ones.
int64_t BytesOf(const DLTensor& tensor) {
  int64_t elements = 1;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] < 0) {
      throw std::invalid_argument("a tensor of shape " + ShapeText(tensor) +
                                  " was asked for, which has a negative dimension");
    }
    elements = Product(elements, tensor.shape[i]);
  }
  return RoundUp(Product(elements, tensor.dtype.bits, tensor.dtype.lanes), 8) / 8;
}

}  // namespace

// A tensor with a shape of its own: the callee may free the prototype's.
struct Arena::Node {
  DLManagedTensorVersioned managed;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::shared_ptr<int> live;
};

Arena::Arena(void* base, size_t size, DLDevice device)
    : base_(static_cast<char*>(base)), size_(size), device_(device), outer_(current_arena) {
  current_arena = this;
}

Arena::~Arena() { current_arena = outer_; }

int Arena::Allocate(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_context,
                    void (*set_error)(void*, const char*, const char*)) {
  const auto fail = [&](const char* kind, const char* message) {
    set_error(error_context, kind, message);
    return -1;
  };
  if (current_arena == nullptr) {
    return fail("RuntimeError", "a tensor was allocated outside of a call");
  }
  try {
    *out = current_arena->Place(*prototype);
    return 0;
  } catch (const TooLarge& error) {
    return fail("MemoryError", error.what());
  } catch (const std::bad_alloc&) {
    return fail("MemoryError", "the host has no memory for a tensor's shape");
  } catch (const std::exception& error) {  // of BytesOf
    return fail("ValueError", error.what());
  }
}

DLManagedTensorVersioned* Arena::Place(const DLTensor& prototype) {
  const int64_t start = RoundUp(used_, kAlignment);
  const int64_t end = Sum(start, BytesOf(prototype));
  if (static_cast<uint64_t>(end) > size_) {
    throw TooLarge("the workspace has " + std::to_string(size_) + " bytes, and at least " +
                   std::to_string(end) + " are needed");
  }
  auto node = std::make_unique<Node>();
  node->shape.assign(prototype.shape, prototype.shape + prototype.ndim);
  node->strides.resize(node->shape.size());
  WriteStrides(node->shape.data(), node->shape.size(), node->strides.data());
  node->managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  node->managed.manager_ctx = node.get();
  node->managed.deleter = [](DLManagedTensorVersioned* self) {
    Node* owner = static_cast<Node*>(self->manager_ctx);
    --*owner->live;
    delete owner;
  };
  node->managed.dl_tensor = DLTensor{base_ + start,
                                     device_,
                                     prototype.ndim,
                                     prototype.dtype,
                                     node->shape.data(),
                                     node->strides.data(),
                                     /*byte_offset=*/0};
  node->live = live_;
  ++*live_;
  used_ = end;
  return &node.release()->managed;
}

}  // namespace jax_nvfp4_moe
