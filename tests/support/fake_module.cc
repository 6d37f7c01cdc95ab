// A module of TVM-FFI functions for the bridge's tests: what it is called with is written down, and
// where it runs on the host it computes. It has a CUDA runtime of its own, which writes down too.

#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

std::mutex mutex;
std::string journal;
thread_local int device = 0;  // as CUDA's current device is
bool capture_fails = false;
void (*cubin_callback)(const char*, const char*) = nullptr;
thread_local std::string cubin;
void* kept = nullptr;
std::atomic<int64_t> calls = 0;

void Write(const std::string& line) {
  std::lock_guard lock(mutex);
  journal += line + "\n";
}

// libtvm_ffi is opened globally before this is, as FlashInfer's modules expect.
template <typename Function>
Function Symbol(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) std::abort();
  return reinterpret_cast<Function>(found);
}

int Fail(const char* kind, const char* message) {
  Symbol<decltype(&TVMFFIErrorSetRaisedFromCStr)>("TVMFFIErrorSetRaisedFromCStr")(kind, message);
  return -1;
}

std::string Text(const DLTensor& tensor) {
  std::string text = "tensor " + std::to_string(tensor.dtype.code) + "/" +
                     std::to_string(tensor.dtype.bits) + "/" + std::to_string(tensor.dtype.lanes) +
                     " [";
  for (int i = 0; i < tensor.ndim; ++i) text += std::to_string(tensor.shape[i]) + " ";
  text += "] strides [";
  for (int i = 0; i < tensor.ndim; ++i) text += std::to_string(tensor.strides[i]) + " ";
  return text + "] device " + std::to_string(tensor.device.device_type) + ":" +
         std::to_string(tensor.device.device_id);
}

std::string Text(const TVMFFIAny& any) {
  char real[64];
  switch (any.type_index) {
    case kTVMFFINone:
      return "None";
    case kTVMFFIInt:
      return "int " + std::to_string(any.v_int64);
    case kTVMFFIBool:
      return std::string("bool ") + (any.v_int64 ? "true" : "false");
    case kTVMFFIFloat:
      std::snprintf(real, sizeof(real), "float %.17g", any.v_float64);
      return real;
    case kTVMFFIDLTensorPtr:
      return Text(*static_cast<DLTensor*>(any.v_ptr));
    case kTVMFFIArray: {
      // The cell follows the object's header (tvm/ffi/c_api.h, TVMFFISeqCell).
      const auto* cell = reinterpret_cast<const TVMFFISeqCell*>(any.v_obj + 1);
      std::string text = "list";
      const auto* items = static_cast<const TVMFFIAny*>(cell->data);
      for (int64_t i = 0; i < cell->size; ++i) text += " (" + Text(items[i]) + ")";
      return text;
    }
    default:
      return "type " + std::to_string(any.type_index);
  }
}

DLTensor& Tensor(const TVMFFIAny& any) { return *static_cast<DLTensor*>(any.v_ptr); }

void* Stream(DLDevice where) {
  return Symbol<decltype(&TVMFFIEnvGetStream)>("TVMFFIEnvGetStream")(where.device_type,
                                                                    where.device_id);
}

}  // namespace

// ------------------------------------------------------------------------------------- functions

// Writes down all arguments, and the stream of the first tensor's device.
EXPORTED int __tvm_ffi_show(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  for (int i = 0; i < count; ++i) Write(Text(args[i]));
  for (int i = 0; i < count; ++i) {
    if (args[i].type_index != kTVMFFIDLTensorPtr) continue;
    const DLDevice where = Tensor(args[i]).device;
    if (where.device_type != kDLCPU) {
      char line[64];
      std::snprintf(line, sizeof(line), "stream %p", Stream(where));
      Write(line);
    }
    break;
  }
  return 0;
}

// (x, scale, y): y = scale * x, float32, on the host.
EXPORTED int __tvm_ffi_scale(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  if (count != 3) return Fail("TypeError", "scale takes 3 arguments");
  const DLTensor& x = Tensor(args[0]);
  const DLTensor& y = Tensor(args[2]);
  int64_t size = 1;
  for (int i = 0; i < x.ndim; ++i) size *= x.shape[i];
  for (int64_t i = 0; i < size; ++i) {
    static_cast<float*>(y.data)[i] = args[1].v_float64 * static_cast<const float*>(x.data)[i];
  }
  return 0;
}

// (..., y): returns at once.
EXPORTED int __tvm_ffi_nothing(void*, const TVMFFIAny*, int32_t, TVMFFIAny*) { return 0; }

// FlashInfer's, by their names alone.
EXPORTED int __tvm_ffi_trtllm_fp4_block_scale_moe(void*, const TVMFFIAny*, int32_t count,
                                                  TVMFFIAny*) {
  Write("trtllm_fp4_block_scale_moe of " + std::to_string(count));
  return 0;
}

#define GEMM(name)                                                                    \
  EXPORTED int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t count, TVMFFIAny*) { \
    Write(#name " of " + std::to_string(count));                                      \
    return 0;                                                                         \
  }
#include "gemms.inc"  // the names of CuTe-DSL's
#undef GEMM

// (..., sizes, y): allocates tensors of that many bytes, releases them, and is counted.
EXPORTED int __tvm_ffi_busy(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  ++calls;
  static const auto allocate = Symbol<decltype(&TVMFFIEnvTensorAlloc)>("TVMFFIEnvTensorAlloc");
  static const auto release = Symbol<decltype(&TVMFFIObjectDecRef)>("TVMFFIObjectDecRef");
  const auto* cell = reinterpret_cast<const TVMFFISeqCell*>(args[count - 2].v_obj + 1);
  for (int64_t i = 0; i < cell->size; ++i) {
    int64_t size = static_cast<const TVMFFIAny*>(cell->data)[i].v_int64;
    DLTensor prototype{};
    prototype.device = Tensor(args[count - 1]).device;
    prototype.ndim = 1;
    prototype.dtype = {kDLUInt, 8, 1};
    prototype.shape = &size;
    void* tensor = nullptr;
    if (allocate(&prototype, &tensor) != 0) return -1;
    release(tensor);
  }
  return 0;
}

// (sizes, y, returned, kept): allocates tensors of that many bytes, on y's device, and writes their
// offsets from the first into y, int64. The first may be returned, the last kept until `release`.
EXPORTED int __tvm_ffi_allocate(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  if (count != 4) return Fail("TypeError", "allocate takes 4 arguments");
  const auto* cell = reinterpret_cast<const TVMFFISeqCell*>(args[0].v_obj + 1);
  const DLTensor& y = Tensor(args[1]);
  auto allocate = Symbol<decltype(&TVMFFIEnvTensorAlloc)>("TVMFFIEnvTensorAlloc");
  auto release = Symbol<decltype(&TVMFFIObjectDecRef)>("TVMFFIObjectDecRef");
  std::vector<void*> made;
  int status = 0;
  for (int64_t i = 0; i < cell->size && status == 0; ++i) {
    DLTensor prototype{};
    // As FlashInfer does: the shape is gone when the call returns.
    std::vector<int64_t> shape = {static_cast<const TVMFFIAny*>(cell->data)[i].v_int64};
    prototype.device = y.device;
    prototype.ndim = 1;
    prototype.dtype = {kDLUInt, 8, 1};
    prototype.shape = shape.data();
    void* tensor = nullptr;
    status = allocate(&prototype, &tensor);
    if (status == 0) made.push_back(tensor);
  }
  std::vector<char*> starts;
  for (void* object : made) {
    const auto* tensor = reinterpret_cast<const DLTensor*>(static_cast<TVMFFIObject*>(object) + 1);
    starts.push_back(static_cast<char*>(tensor->data));
    Write(Text(*tensor));
  }
  if (status == 0 && y.device.device_type == kDLCPU) {
    for (size_t i = 0; i < starts.size(); ++i) {
      static_cast<int64_t*>(y.data)[i] = starts[i] - starts[0];
    }
  }
  if (status == 0 && args[2].v_int64 && !made.empty()) {
    result->type_index = kTVMFFITensor;
    result->v_obj = static_cast<TVMFFIObject*>(made.front());
    made.erase(made.begin());
  }
  if (status == 0 && args[3].v_int64 && !made.empty()) {
    kept = made.back();
    made.pop_back();
  }
  for (void* object : made) release(object);
  return status;
}

// (shape, bits, y): allocates one tensor of that shape, of unsigned integers of so many bits.
EXPORTED int __tvm_ffi_allocate_one(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  if (count != 3) return Fail("TypeError", "allocate_one takes 3 arguments");
  const auto* cell = reinterpret_cast<const TVMFFISeqCell*>(args[0].v_obj + 1);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < cell->size; ++i) {
    shape.push_back(static_cast<const TVMFFIAny*>(cell->data)[i].v_int64);
  }
  DLTensor prototype{};
  prototype.device = Tensor(args[2]).device;
  prototype.ndim = static_cast<int32_t>(shape.size());
  prototype.dtype = {kDLUInt, static_cast<uint8_t>(args[1].v_int64), 1};
  prototype.shape = shape.data();
  void* tensor = nullptr;
  if (Symbol<decltype(&TVMFFIEnvTensorAlloc)>("TVMFFIEnvTensorAlloc")(&prototype, &tensor) != 0) {
    return -1;
  }
  Write(Text(*reinterpret_cast<const DLTensor*>(static_cast<TVMFFIObject*>(tensor) + 1)));
  Symbol<decltype(&TVMFFIObjectDecRef)>("TVMFFIObjectDecRef")(tensor);
  return 0;
}

EXPORTED void release() {
  Symbol<decltype(&TVMFFIObjectDecRef)>("TVMFFIObjectDecRef")(kept);
}

// (which, y): fails in that way.
EXPORTED int __tvm_ffi_fail(void*, const TVMFFIAny* args, int32_t, TVMFFIAny*) {
  static const char* const kinds[] = {"ValueError",          "TypeError",   "IndexError",
                                      "NotImplementedError", "MemoryError", "RuntimeError"};
  if (args[0].v_int64 == 6) return -1;  // without a word
  return Fail(kinds[args[0].v_int64], "as it was told");
}

// (which, y): asks for one of some images, as a kernel's first launch does.
EXPORTED int __tvm_ffi_image(void*, const TVMFFIAny* args, int32_t, TVMFFIAny*) {
  // "image" and what its SHA-256 is.
  static const char* const digest =
      "6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d";
  static const char* const paths[] = {"good.cubin", "bad.cubin", "none.cubin", "../good.cubin"};
  cubin.clear();
  try {
    cubin_callback(paths[args[0].v_int64], digest);
  } catch (const std::exception& error) {
    return Fail("RuntimeError", error.what());
  }
  Write("image " + cubin);
  return 0;
}

EXPORTED void FlashInferSetCubinCallback(void (*callback)(const char*, const char*)) {
  cubin_callback = callback;
}

EXPORTED void FlashInferSetCurrentCubin(const char* data, int size) { cubin.assign(data, size); }

// --------------------------------------------------------------------------------- a CUDA runtime

EXPORTED int cudaGetDevice(int* ordinal) {
  *ordinal = device;
  return 0;
}

EXPORTED int cudaSetDevice(int ordinal) {
  device = ordinal;
  Write("cudaSetDevice " + std::to_string(ordinal));
  return ordinal < 8 ? 0 : 101;
}

EXPORTED int cudaStreamCreateWithFlags(void** stream, unsigned flags) {
  *stream = reinterpret_cast<void*>(0xcafe0);
  Write("cudaStreamCreateWithFlags " + std::to_string(flags));
  return 0;
}

EXPORTED int cudaStreamDestroy(void*) {
  Write("cudaStreamDestroy");
  return 0;
}

EXPORTED int cudaStreamBeginCapture(void*, int mode) {
  Write("cudaStreamBeginCapture " + std::to_string(mode));
  return capture_fails ? 900 : 0;
}

EXPORTED int cudaStreamEndCapture(void*, void** graph) {
  *graph = reinterpret_cast<void*>(0x9a9);
  Write("cudaStreamEndCapture");
  return 0;
}

EXPORTED int cudaGraphDestroy(void*) {
  Write("cudaGraphDestroy");
  return 0;
}

EXPORTED const char* cudaGetErrorString(int) { return "an error of the fake runtime"; }

// ------------------------------------------------------------------------------- for Python's side

// Copies the journal and empties it; returns its length.
EXPORTED int64_t take_journal(char* out, int64_t room) {
  std::lock_guard lock(mutex);
  const int64_t size = static_cast<int64_t>(journal.size());
  if (size < room) std::copy(journal.begin(), journal.end(), out), out[size] = 0;
  journal.clear();
  return size;
}

EXPORTED int64_t busy_calls() { return calls; }

EXPORTED void set_capture_fails(int fails) { capture_fails = fails; }
