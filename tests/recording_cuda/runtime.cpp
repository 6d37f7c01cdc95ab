// A stand-in for libcudart.so.13 and libcuda.so.1 that runs nothing and writes down every launch.
//
// It has what FlashInfer's TRTLLM-Gen MoE module and CuTe-DSL's runtime import. Loaded before, it lets
// the module's host code run unchanged on a machine without a GPU: checks, choice of kernels,
// workspace, tensor maps, launches. "Device" memory is whatever addresses the caller hands in;
// nothing here ever dereferences one. A call that would have to read or write device memory, to
// allocate it or to wait for it is written down and refused, so that no caller gets by with it.
//
// This is the runtime's half; driver.cpp is the driver's.

#include <dlfcn.h>

#include <cstring>

#include "log.h"
#include "state.h"

using namespace recording;

namespace {

struct FatBinary {
  Kernels kernels;
};

Kernel* Registered(const void* host_function) {
  std::lock_guard<std::mutex> lock(GetState().mutex);
  const auto found = GetState().by_host_function.find(host_function);
  return found == GetState().by_host_function.end() ? nullptr : found->second.get();
}

// The kernel that the runtime is given: a host function, or a library's (libraries.cpp).
Kernel* Given(const void* function) {
  Kernel* kernel = Registered(function);
  return kernel ? kernel : Loaded(function);
}

}  // namespace

// --- Registration, which nvcc's generated code does (crt/host_runtime.h)
// --------------------------

EXPORT void** __cudaRegisterFatBinary(void* wrapper) {
  auto* binary = new FatBinary{KernelsOfPtx(FatbinOf(wrapper))};
  return reinterpret_cast<void**>(binary);
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

// What was registered stays: at exit, when modules unregister, nobody launches any more.
EXPORT void __cudaUnregisterFatBinary(void**) {}

EXPORT void __cudaRegisterFunction(void** handle, const char* host_function, char*,
                                   const char* name, int, void*, void*, void*, void*, int*) {
  auto kernel = std::make_unique<Kernel>();
  kernel->name = name;
  kernel->parameters = ParametersIn(reinterpret_cast<FatBinary*>(handle)->kernels, name);
  std::lock_guard<std::mutex> lock(GetState().mutex);
  GetState().by_host_function[host_function] = std::move(kernel);
}

EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// --- Launches through the runtime
// -----------------------------------------------------------------

namespace {
struct CallConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
thread_local std::vector<CallConfiguration> call_configurations;  // kernel<<<...>>> in flight.
}  // namespace

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  call_configurations.push_back({grid, block, shared, stream});
  return 0;
}

EXPORT int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (call_configurations.empty()) return Failed(kInvalidConfiguration);
  const auto& top = call_configurations.back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared_bytes;
  std::memcpy(stream, &top.stream, sizeof top.stream);
  call_configurations.pop_back();
  return kSuccess;
}

// A kernel's handle is the address of its host function.
EXPORT int __cudaGetKernel(const void** kernel, const void* host_function) {
  *kernel = host_function;
  return kSuccess;
}

EXPORT int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                              size_t shared_bytes, void* stream) {
  return Failed(Launch("__cudaLaunchKernel", Registered(kernel), grid, block, shared_bytes, stream,
                       nullptr, 0, arguments));
}

EXPORT int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                            size_t shared_bytes, void* stream) {
  return Failed(Launch("cudaLaunchKernel", Registered(function), grid, block, shared_bytes, stream,
                       nullptr, 0, arguments));
}

EXPORT int cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                               void** arguments) {
  return Failed(Launch("cudaLaunchKernelExC", Given(function), config->grid, config->block,
                       config->shared_bytes, config->stream, config->attributes,
                       config->attribute_count, arguments));
}

EXPORT int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  Kernel* kernel = Given(function);
  return Failed(kernel ? SetAttribute(*kernel, attribute, value, current_device)
                       : int{kInvalidDeviceFunction});
}

// --- Devices, errors ---------------------------------------------------------------------

EXPORT int cudaGetDevice(int* ordinal) {
  *ordinal = current_device;
  return kSuccess;
}

EXPORT int cudaSetDevice(int ordinal) {
  if (ordinal < 0 || ordinal >= GetDevice().count) return Failed(kInvalidDevice);
  current_device = ordinal;
  return kSuccess;
}

EXPORT int cudaGetDeviceCount(int* count) {
  *count = GetDevice().count;
  return kSuccess;
}

EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int ordinal) {
  if (ordinal < 0 || ordinal >= GetDevice().count) return Failed(kInvalidDevice);
  switch (attribute) {
    case kMaxThreadsPerBlock: *value = kThreadsPerBlock; break;
    case kMaxSharedMemoryPerBlock: *value = kSharedPerBlock; break;
    case kWarpSize: *value = 32; break;
    case kMultiProcessorCount: *value = GetDevice().multiprocessors; break;
    case kComputeCapabilityMajor: *value = GetDevice().major; break;
    case kComputeCapabilityMinor: *value = GetDevice().minor; break;
    case kMaxSharedMemoryPerMultiprocessor: *value = kSharedPerMultiprocessor; break;
    case kCooperativeLaunch: *value = 1; break;
    case kMaxSharedMemoryPerBlockOptin: *value = kSharedPerBlockOptin; break;
    default:
      Log::Get().Write(Entry("unknown_attribute").Add("attribute", attribute));
      return Failed(kInvalidValue);
  }
  return kSuccess;
}

EXPORT int cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->type = 2;  // driver_types.h cudaMemoryTypeDevice
  attributes->device = current_device;
  attributes->device_pointer = const_cast<void*>(pointer);
  return kSuccess;
}

EXPORT int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}

EXPORT int cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorString(int error) { return Describe(error); }
EXPORT const char* cudaGetErrorName(int error) { return Describe(error); }

EXPORT int cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

EXPORT int cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                            unsigned long long, int* result) {
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&cudaGetDriverEntryPointByVersion), &self);
  void* library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  *function = library ? dlsym(library, symbol) : nullptr;
  // driver_types.h cudaDriverEntryPointQueryResult: 0 found, 1 not found.
  if (result) *result = *function ? 0 : 1;
  if (!*function) Log::Get().Write(Entry("unknown_symbol").Add("symbol", symbol));
  return kSuccess;
}

// --- Streams, and their capture into graphs
// ---------------------------------------------------------

EXPORT int cudaStreamCreateWithFlags(void** stream, unsigned flags) {
  static std::atomic<uintptr_t> next{0x57ea0000};
  *stream = reinterpret_cast<void*>(next += 0x100);
  Log::Get().Write(Entry("stream_create").Add("stream", *stream).Add("flags", flags));
  return kSuccess;
}

EXPORT int cudaStreamDestroy(void* stream) {
  Log::Get().Write(Entry("stream_destroy").Add("stream", stream));
  return kSuccess;
}

EXPORT int cudaStreamIsCapturing(void* stream, int* status) {
  std::lock_guard<std::mutex> lock(GetState().mutex);
  *status = GetState().captures.count(stream) ? kCapturing : kNotCapturing;
  return kSuccess;
}

EXPORT int cudaStreamBeginCapture(void* stream, int mode) {
  if (!stream) return Failed(kCaptureUnsupported);  // The legacy stream cannot be captured.
  std::lock_guard<std::mutex> lock(GetState().mutex);
  if (!GetState().captures.try_emplace(stream, Capture{mode, ThreadName(), 0}).second) {
    return Failed(kIllegalState);
  }
  Log::Get().Write(Entry("capture_begin").Add("stream", stream).Add("mode", mode));
  return kSuccess;
}

// The graph is a handle that only cudaGraphDestroy takes: there is nothing to replay.
EXPORT int cudaStreamEndCapture(void* stream, void** graph) {
  std::lock_guard<std::mutex> lock(GetState().mutex);
  const auto found = GetState().captures.find(stream);
  *graph = nullptr;
  if (found == GetState().captures.end()) return Failed(kIllegalState);
  Log::Get().Write(
      Entry("capture_end").Add("stream", stream).Add("launches", found->second.launches));
  *graph = new char;
  GetState().captures.erase(found);
  return kSuccess;
}

EXPORT int cudaGraphDestroy(void* graph) {
  delete static_cast<char*>(graph);
  return kSuccess;
}

// --- What is refused
// --------------------------------------------------------------------------------

EXPORT int cudaMalloc(void** pointer, size_t bytes) {
  *pointer = nullptr;
  return Refuse("cudaMalloc", bytes);
}

EXPORT int cudaMallocHost(void** pointer, size_t bytes) {
  *pointer = nullptr;
  return Refuse("cudaMallocHost", bytes);
}

EXPORT int cudaFree(void* pointer) { return pointer ? Refuse("cudaFree") : int{kSuccess}; }

EXPORT int cudaMemcpy(void*, const void*, size_t bytes, int) { return Refuse("cudaMemcpy", bytes); }

EXPORT int cudaMemcpyAsync(void*, const void*, size_t bytes, int, void* stream) {
  return Refuse("cudaMemcpyAsync", bytes, stream);
}

EXPORT int cudaMemset(void*, int, size_t bytes) { return Refuse("cudaMemset", bytes); }

EXPORT int cudaMemsetAsync(void*, int, size_t bytes, void* stream) {
  return Refuse("cudaMemsetAsync", bytes, stream);
}

EXPORT int cudaDeviceSynchronize() { return Refuse("cudaDeviceSynchronize"); }

EXPORT int cudaStreamSynchronize(void* stream) {
  return Refuse("cudaStreamSynchronize", 0, stream);
}
