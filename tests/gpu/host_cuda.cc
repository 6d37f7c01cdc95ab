// What functions.cc needs of a CUDA runtime and a driver, with the kernels run on the host at once,
// so that the tests can be tried without a GPU. Launches on a stream that is being captured are
// thrown away, which is all that the bridge itself does with captures.

#include <cmath>
#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct Index {
  unsigned x;
};
thread_local Index blockIdx, blockDim, threadIdx;
thread_local long long now = 0;

long long clock64() { return now += 1000; }

}  // namespace

#define __global__
#include "kernels.cu"
#undef __global__

namespace {

// cuda.h, CUresult.
enum {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidImage = 200,
  kInvalidHandle = 400,
  kNotFound = 500,
};

std::mutex mutex;
std::set<void*> captured;  // streams
thread_local int current_device = 0;

template <typename... Arguments, size_t... I>
void Run(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Arguments*>(arguments[I])...);
}

template <typename... Arguments>
void RunAll(void (*kernel)(Arguments...), void** arguments, unsigned blocks, unsigned threads) {
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      Run(kernel, arguments, std::index_sequence_for<Arguments...>());
    }
  }
}

// What module and function handles point to: both belong to one device.
struct Loaded {
  int device;
  std::string name;  // of the function; a module's is empty
};

}  // namespace

EXPORTED int cudaGetDevice(int* ordinal) {
  *ordinal = current_device;
  return kSuccess;
}

EXPORTED int cudaSetDevice(int ordinal) {
  current_device = ordinal;
  return kSuccess;
}

EXPORTED int cudaStreamCreateWithFlags(void** stream, unsigned) {
  *stream = new char;
  return kSuccess;
}

EXPORTED int cudaStreamDestroy(void* stream) {
  delete static_cast<char*>(stream);
  return kSuccess;
}

EXPORTED int cudaStreamBeginCapture(void* stream, int) {
  std::lock_guard lock(mutex);
  return captured.insert(stream).second ? kSuccess : kInvalidValue;
}

EXPORTED int cudaStreamEndCapture(void* stream, void** graph) {
  std::lock_guard lock(mutex);
  *graph = nullptr;
  return captured.erase(stream) == 1 ? kSuccess : kInvalidValue;
}

EXPORTED int cudaStreamIsCapturing(void* stream, int* status) {
  std::lock_guard lock(mutex);
  *status = static_cast<int>(captured.count(stream));
  return kSuccess;
}

EXPORTED int cudaGraphDestroy(void*) { return kSuccess; }

EXPORTED const char* cudaGetErrorString(int) { return "an error of the host's CUDA"; }

EXPORTED int cuModuleLoadData(void** module, const void* image) {
  if (std::strstr(static_cast<const char*>(image), ".version") == nullptr) return kInvalidImage;
  *module = new Loaded{current_device, ""};
  return kSuccess;
}

EXPORTED int cuModuleGetFunction(void** function, void* module, const char* name) {
  static std::map<std::pair<void*, std::string>, Loaded> functions;
  const std::string known = " axpb reverse silu_and_mul idle ";
  if (known.find(" " + std::string(name) + " ") == std::string::npos) return kNotFound;
  std::lock_guard lock(mutex);
  const Loaded loaded{static_cast<Loaded*>(module)->device, name};
  *function = &functions.emplace(std::pair(module, name), loaded).first->second;
  return kSuccess;
}

EXPORTED int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned,
                            void* stream, void** arguments, void** extra) {
  const Loaded& kernel = *static_cast<Loaded*>(function);
  if (grid_x * grid_y * grid_z != grid_x || grid_x == 0) return kInvalidValue;
  if (block_x * block_y * block_z != block_x || block_x == 0) return kInvalidValue;
  if (block_x > 1024) return kInvalidValue;
  if (extra != nullptr) return kInvalidValue;
  if (kernel.device != current_device) return kInvalidHandle;
  {
    std::lock_guard lock(mutex);
    if (captured.count(stream) != 0) return kSuccess;
  }
  if (kernel.name == "axpb") RunAll(axpb, arguments, grid_x, block_x);
  if (kernel.name == "reverse") RunAll(reverse, arguments, grid_x, block_x);
  if (kernel.name == "silu_and_mul") RunAll(silu_and_mul, arguments, grid_x, block_x);
  if (kernel.name == "idle") RunAll(idle, arguments, 1, 1);
  return kSuccess;
}
