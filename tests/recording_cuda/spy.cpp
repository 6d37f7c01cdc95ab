// Stands between a caller and FlashInfer's MoE function, to see calls that somebody else makes, for
// example a bridge from inside jax.jit.
//
// It is a library that is linked to FlashInfer's module and has a function of the same name, so a
// caller that opens this one instead finds everything else in the module. Each call is written down
// with its arguments, stream and workspace. And every tensor that the module gets, workspace
// included, lies on reserved pages instead of in the caller's memory: what a launcher passes on to
// kernels can be told apart, and one that touches it ends the process.
//
// Structures: tvm/ffi/c_api.h and dlpack/dlpack.h of apache-tvm-ffi 0.1.15.

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "log.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using recording::Entry;

namespace {

struct Device {
  int32_t type, id;
};

struct Tensor {  // DLTensor
  void* data;
  Device device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {  // DLManagedTensorVersioned
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

struct Any {  // TVMFFIAny
  int32_t type;
  uint32_t zero;
  union {
    int64_t integer;
    double real;
    void* pointer;
  };
};

struct Sequence {  // TVMFFIObject and the TVMFFISeqCell after it
  char header[24];
  const Any* data;
  int64_t size;
};

struct TensorObject {  // TVMFFIObject and the DLTensor after it
  char header[24];
  Tensor tensor;
};

enum {
  kNone = 0,
  kInt = 1,
  kBool = 2,
  kFloat = 3,
  kTensorPointer = 7,
  kTensorObject = 70,
  kArray = 71
};
constexpr int kCuda = 2;  // kDLCUDA

using SetError = void (*)(void* context, const char* kind, const char* message);
using Allocator = int (*)(Tensor*, ManagedTensor**, void*, SetError);
using Function = int (*)(void*, const Any*, int32_t, Any*);

}  // namespace

// libtvm_ffi.so, loaded globally before this.
extern "C" {
void* TVMFFIEnvGetStream(int32_t device_type, int32_t device_id);
int TVMFFIEnvSetDLPackManagedTensorAllocator(Allocator, int global, Allocator* previous);
Allocator TVMFFIEnvGetDLPackManagedTensorAllocator();
// The stand-in runtime.
void rec_write(const char* json);
}

namespace {

std::mutex mutex;
std::vector<std::pair<void*, size_t>> reserved;

thread_local Allocator callers_allocator = nullptr;

uint64_t SizeOf(const Tensor& tensor) {
  uint64_t bits = uint64_t{tensor.bits} * tensor.lanes;
  for (int i = 0; i < tensor.ndim; ++i) bits *= static_cast<uint64_t>(tensor.shape[i]);
  return (bits + 7) / 8;
}

// As many untouchable bytes, at an address that is aligned as the caller's is up to a page. They
// begin 2 GiB past a multiple of 4 GiB: buffers.py says why.
void* Reserve(const Tensor& tensor) {
  constexpr uintptr_t kPage = 4096, kFirst = 0x3000, kLast = 0x5000, kBegin = uintptr_t{1} << 31;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(tensor.data) % kPage;
  const size_t length = offset + SizeOf(tensor) + tensor.byte_offset + kPage;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
  std::lock_guard<std::mutex> lock(mutex);
  static uintptr_t slot = kFirst;
  for (uintptr_t tries = kFirst; tries < kLast; ++tries) {
    void* wanted = reinterpret_cast<void*>((slot << 32) + kBegin);
    slot = slot + 1 < kLast ? slot + 1 : kFirst;
    void* pages = mmap(wanted, length, PROT_NONE, kFlags, -1, 0);
    if (pages == wanted) {
      reserved.emplace_back(pages, length);
      return static_cast<char*>(pages) + offset;
    }
  }
  std::fprintf(stderr, "no room for a tensor of %zu bytes: call rec_spy_release\n", length);
  std::abort();
}

Entry& Describe(Entry& entry, const Tensor& tensor, const void* address) {
  entry.Add("caller_address", static_cast<const void*>(tensor.data))
      .Add("address", address)
      .Add("bytes", SizeOf(tensor))
      .Add("shape", std::vector<uint64_t>(tensor.shape, tensor.shape + tensor.ndim))
      .Add("code", int{tensor.code})
      .Add("bits", int{tensor.bits})
      .Add("lanes", int{tensor.lanes})
      .Add("device_type", tensor.device.type)
      .Add("device", tensor.device.id)
      .Add("byte_offset", tensor.byte_offset);
  if (!tensor.strides) return entry.AddNull("strides");
  return entry.Add("strides", std::vector<int64_t>(tensor.strides, tensor.strides + tensor.ndim));
}

// Lets the caller's allocator decide, and hands reserved pages on in place of its memory.
int Allocate(Tensor* prototype, ManagedTensor** out, void* context, SetError set_error) {
  const int status = callers_allocator(prototype, out, context, set_error);
  Entry entry("allocation");
  entry.Add("status", status);
  if (status == 0) {
    Tensor& tensor = (*out)->tensor;
    void* address = Reserve(tensor);
    rec_write(Describe(entry, tensor, address).Str().c_str());
    tensor.data = address;
    return 0;
  }
  Tensor wanted = *prototype;
  wanted.data = nullptr;
  wanted.strides = nullptr;
  wanted.byte_offset = 0;
  rec_write(Describe(entry, wanted, nullptr).Str().c_str());
  return status;
}

// Writes down one argument; a tensor is replaced by `copy`, on reserved pages.
void Observe(int index, Any& argument, Tensor& copy) {
  Entry entry("argument");
  entry.Add("index", index).Add("type", argument.type);
  const Tensor* tensor = nullptr;
  if (argument.type == kTensorPointer) tensor = static_cast<const Tensor*>(argument.pointer);
  if (argument.type == kTensorObject) {
    tensor = &static_cast<const TensorObject*>(argument.pointer)->tensor;
  }
  if (tensor) {
    copy = *tensor;
    copy.data = Reserve(*tensor);
    Describe(entry, *tensor, copy.data);
    argument = Any{kTensorPointer, 0, {}};
    argument.pointer = &copy;
  } else if (argument.type == kArray) {
    const auto* sequence = static_cast<const Sequence*>(argument.pointer);
    std::vector<int64_t> values;
    for (int64_t i = 0; i < sequence->size; ++i) values.push_back(sequence->data[i].integer);
    entry.Add("value", values);
  } else if (argument.type == kFloat) {
    entry.Add("value", std::to_string(argument.real));
  } else if (argument.type == kNone) {
    entry.AddNull("value");
  } else {
    entry.Add("value", argument.integer);
  }
  rec_write(entry.Str().c_str());
}

struct Allocation {  // Puts our allocator between, for one call.
  Allocation() {
    before = callers_allocator;
    callers_allocator = TVMFFIEnvGetDLPackManagedTensorAllocator();
    if (callers_allocator) TVMFFIEnvSetDLPackManagedTensorAllocator(Allocate, 0, &previous);
  }
  ~Allocation() {
    if (callers_allocator) TVMFFIEnvSetDLPackManagedTensorAllocator(previous, 0, nullptr);
    callers_allocator = before;
  }
  Allocator before, previous = nullptr;
};

int Call(const char* name, void* self, const Any* args, int32_t count, Any* result) {
  const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
  if (!real) std::abort();
  std::vector<Any> given(args, args + count);
  std::vector<Tensor> copies(count);
  int device = 0;
  for (int i = 0; i < count; ++i) {
    if (args[i].type == kTensorPointer) device = static_cast<Tensor*>(args[i].pointer)->device.id;
  }
  rec_write(Entry("call_begin")
                .Add("function", name)
                .Add("device", device)
                .Add("stream", static_cast<const void*>(TVMFFIEnvGetStream(kCuda, device)))
                .Str()
                .c_str());
  for (int i = 0; i < count; ++i) Observe(i, given[i], copies[i]);
  int status;
  {
    Allocation allocation;
    status = real(self, given.data(), count, result);
  }
  rec_write(Entry("call_end").Add("status", status).Str().c_str());
  return status;
}

}  // namespace

EXPORT int __tvm_ffi_trtllm_fp4_block_scale_moe(void* self, const Any* args, int32_t count,
                                                Any* result) {
  return Call(__func__, self, args, count, result);
}

// Gives back what calls reserved. Only when none is under way and nobody looks at what they wrote.
EXPORT void rec_spy_release() {
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [pages, length] : reserved) munmap(pages, length);
  reserved.clear();
}
