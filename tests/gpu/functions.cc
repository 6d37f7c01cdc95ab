// A module of TVM-FFI functions that launch CUDA kernels, for the bridge's tests: linked to a CUDA
// runtime and a driver as FlashInfer's modules are, and built without CUDA's compiler or headers.
//
// Functions check that they were called as they should be: on the tensors' device, on a stream.

#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#define EXPORTED extern "C" __attribute__((visibility("default")))

// cuda_runtime_api.h and cuda.h, with enums and handles as the ABI has them.
extern "C" {
int cudaGetDevice(int* ordinal);
int cudaStreamIsCapturing(void* stream, int* status);
int cuModuleLoadData(void** module, const void* image);
int cuModuleGetFunction(void** function, void* module, const char* name);
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void* stream, void** arguments, void** extra);
}

// kernels.ptx, which the driver compiles, with the zero that ends it.
asm(".pushsection .rodata\n"
    "kernels_ptx: .incbin \"kernels.ptx\"\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const char kernels_ptx[];

namespace {

// See Counts in harness.py.
struct {
  std::atomic<int64_t> calls, captured, launches, loads;
} counts;

struct Error {
  const char* kind;
  std::string message;
};

[[noreturn]] void Fail(const std::string& message) { throw Error{"RuntimeError", message}; }

void Check(int status, const char* what) {
  if (status != 0) Fail(std::string(what) + " returned " + std::to_string(status));
}

// libtvm_ffi is opened globally before this is, as FlashInfer's modules expect.
template <typename Function>
Function Symbol(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) std::abort();
  return reinterpret_cast<Function>(found);
}

DLTensor& Tensor(const TVMFFIAny& any) { return *static_cast<DLTensor*>(any.v_ptr); }

float* Data(const DLTensor& tensor) { return static_cast<float*>(tensor.data); }

int Size(const DLTensor& tensor) {
  int64_t size = 1;
  for (int i = 0; i < tensor.ndim; ++i) size *= tensor.shape[i];
  return static_cast<int>(size);
}

// A kernel on the current device, which is `ordinal`. The image is loaded when the first is needed,
// and each kernel may be at its own first need (CUDA_MODULE_LOADING).
void* Kernel(const char* name, int ordinal) {
  static std::mutex mutex;
  static std::map<int, void*> modules;
  static std::map<std::pair<int, std::string>, void*> functions;
  std::lock_guard lock(mutex);
  void*& module = modules[ordinal];
  if (module == nullptr) {
    Check(cuModuleLoadData(&module, kernels_ptx), "cuModuleLoadData");
    ++counts.loads;
  }
  void*& function = functions[{ordinal, name}];
  if (function == nullptr) {
    Check(cuModuleGetFunction(&function, module, name), "cuModuleGetFunction");
  }
  return function;
}

// Where a call launches: the device of its output, this thread's stream there.
class Place {
 public:
  explicit Place(const DLTensor& output) : device_(output.device) {
    if (device_.device_type != kDLCUDA) Fail("the output is on no GPU");
    int current = -1;
    Check(cudaGetDevice(&current), "cudaGetDevice");
    if (current != device_.device_id) {
      Fail("device " + std::to_string(current) + " is current, and the output is on " +
           std::to_string(device_.device_id));
    }
    static const auto get = Symbol<decltype(&TVMFFIEnvGetStream)>("TVMFFIEnvGetStream");
    stream_ = get(device_.device_type, device_.device_id);
    if (stream_ == nullptr) Fail("there is no stream");
    int status = 0;
    Check(cudaStreamIsCapturing(stream_, &status), "cudaStreamIsCapturing");
    if (status == 1) ++counts.captured;  // cudaStreamCaptureStatusActive
  }

  DLDevice device() const { return device_; }

  // Launches a kernel with a number of threads; none is nothing to do.
  template <typename... Arguments>
  void Launch(const char* kernel, int threads, Arguments... arguments) const {
    if (threads == 0) return;
    constexpr int kBlock = 128;
    void* pointers[] = {&arguments...};
    Check(cuLaunchKernel(Kernel(kernel, device_.device_id), (threads + kBlock - 1) / kBlock, 1, 1,
                         kBlock, 1, 1, 0, stream_, pointers, nullptr),
          "cuLaunchKernel");
    ++counts.launches;
  }

 private:
  DLDevice device_;
  void* stream_ = nullptr;
};

// A float32 tensor that the allocator in force made.
class Temporary {
 public:
  Temporary(int64_t size, DLDevice device) {
    DLTensor prototype{};
    prototype.device = device;
    prototype.ndim = 1;
    prototype.dtype = {kDLFloat, 32, 1};
    prototype.shape = &size;
    static const auto allocate = Symbol<decltype(&TVMFFIEnvTensorAlloc)>("TVMFFIEnvTensorAlloc");
    if (allocate(&prototype, &object_) != 0) throw Error{nullptr, ""};
  }
  ~Temporary() { Symbol<decltype(&TVMFFIObjectDecRef)>("TVMFFIObjectDecRef")(object_); }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;

  // The tensor follows the object's header (tvm/ffi/c_api.h).
  float* data() const {
    return Data(*reinterpret_cast<DLTensor*>(static_cast<TVMFFIObject*>(object_) + 1));
  }

 private:
  TVMFFIObjectHandle object_ = nullptr;
};

// Runs `body`, with what it throws as TVM-FFI's error; without a kind, one that was raised already.
template <typename Body>
int Called(int32_t count, int32_t expected, Body&& body) {
  ++counts.calls;
  try {
    if (count != expected) throw Error{"TypeError", "it takes other arguments"};
    body();
    return 0;
  } catch (const Error& error) {
    if (error.kind != nullptr) {
      Symbol<decltype(&TVMFFIErrorSetRaisedFromCStr)>("TVMFFIErrorSetRaisedFromCStr")(
          error.kind, error.message.c_str());
    }
    return -1;
  }
}

}  // namespace

// (x, bias, negate, factor, steps, offsets, y): y = ±factor x + (steps + all offsets), and bias
// where it is not None.
EXPORTED int __tvm_ffi_axpb(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  return Called(count, 7, [&] {
    const DLTensor& y = Tensor(args[6]);
    const bool has_bias = args[1].type_index != kTVMFFINone;
    const double factor = args[2].v_int64 ? -args[3].v_float64 : args[3].v_float64;
    int64_t offset = args[4].v_int64;
    // The cell follows the object's header (tvm/ffi/c_api.h, TVMFFISeqCell).
    const auto* offsets = reinterpret_cast<const TVMFFISeqCell*>(args[5].v_obj + 1);
    for (int64_t i = 0; i < offsets->size; ++i) {
      offset += static_cast<const TVMFFIAny*>(offsets->data)[i].v_int64;
    }
    Place(y).Launch("axpb", Size(y), Data(Tensor(args[0])),
                    has_bias ? Data(Tensor(args[1])) : nullptr, static_cast<float>(factor),
                    static_cast<float>(offset), Data(y), Size(y));
  });
}

// (x, y): x is [rows, 2 columns], y [rows, columns].
EXPORTED int __tvm_ffi_silu_and_mul(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  return Called(count, 2, [&] {
    const DLTensor& y = Tensor(args[1]);
    Place(y).Launch("silu_and_mul", Size(y), Data(Tensor(args[0])), Data(y),
                    static_cast<int>(y.shape[0]), static_cast<int>(y.shape[1]));
  });
}

// (x, cycles, y): y = x + 1 backwards, by way of a temporary, after the GPU waited that long.
EXPORTED int __tvm_ffi_reverse(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  return Called(count, 3, [&] {
    const DLTensor& y = Tensor(args[2]);
    const Place place(y);
    const int size = Size(y);
    const Temporary between(size, place.device());
    const float* none = nullptr;
    place.Launch("idle", 1, static_cast<long long>(args[1].v_int64));
    place.Launch("axpb", size, Data(Tensor(args[0])), none, 1.0f, 1.0f, between.data(), size);
    place.Launch("reverse", size, between.data(), Data(y), size);
  });
}

// (..., y): writes nothing, for controls.
EXPORTED int __tvm_ffi_leave(void*, const TVMFFIAny*, int32_t count, TVMFFIAny*) {
  return Called(count, count, [] {});
}

// (which, y): fails in that way, before anything is launched.
EXPORTED int __tvm_ffi_fail(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  static const char* const kinds[] = {"ValueError",          "TypeError",   "IndexError",
                                      "NotImplementedError", "MemoryError", "RuntimeError"};
  return Called(count, 2, [&] {
    const Place place(Tensor(args[1]));
    throw Error{kinds[args[0].v_int64], "as it was told"};
  });
}

EXPORTED void take_counts(int64_t* out) {
  out[0] = counts.calls;
  out[1] = counts.captured;
  out[2] = counts.launches;
  out[3] = counts.loads;
}
