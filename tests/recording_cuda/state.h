// What the runtime half (runtime.cpp) and the driver half (driver.cpp) of the stand-in share.

#ifndef JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_STATE_H_
#define JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_STATE_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "images.h"

namespace recording {

// The devices that there seem to be. Environment, read once: RECORDING_CUDA_CAPABILITY ("10.0"),
// RECORDING_CUDA_MULTIPROCESSORS (148) and RECORDING_CUDA_DEVICES (8).
struct Device {
  int major, minor, multiprocessors, count;
};
const Device& GetDevice();

extern thread_local int current_device;
extern thread_local int last_error;

// Keeps an error for cudaGetLastError, and returns it.
int Failed(int error);
const char* Describe(int error);

// Writes down and refuses what nothing on the NVFP4 path may call.
int Refuse(const char* api, uint64_t bytes = 0, const void* stream = nullptr);

struct Kernel {
  std::string name;
  const Parameters* parameters = nullptr;  // Null if the image did not tell.
  int static_shared = 0;
  std::map<int, int> max_dynamic_shared;  // By device; kSharedPerBlock where it was not set.
};

struct Module {
  std::string sha256;
  Kernels kernels;
  std::map<std::string, uint64_t> static_shared;
  std::map<std::string, Kernel> functions;  // What was asked for.
};

struct Capture {
  int mode;
  std::string thread;
  uint64_t launches;
};

struct State {
  std::mutex mutex;
  std::map<const void*, std::unique_ptr<Kernel>> by_host_function;  // Registered kernels.
  std::set<const void*> functions;                                  // Of loaded modules.
  std::set<Module*> modules;
  std::map<const void*, Capture> captures;  // By stream.
};
State& GetState();  // Never destroyed: modules unregister during exit.

// The parameters of one kernel of an image, or null.
const Parameters* ParametersIn(const Kernels& kernels, const std::string& name);

// Sets the dynamic shared memory that a kernel may be launched with on a device.
int SetAttribute(Kernel& kernel, int attribute, int value, int device);

// Prebuilt kernels (driver.cpp): loads an image for all devices, finds a function of it and forgets
// it again. A handle is a Module's or a Kernel's address.
int LoadImage(const char* api, void** handle, const void* image);
int FindFunction(void** function, void* handle, const char* name);
int Unload(void* handle);

// The kernel behind a handle of FindFunction's, or null.
Kernel* Loaded(const void* function);

// Tensor maps this thread has encoded since it last launched. Parameter structures are built on the
// stack and parts that a kernel does not use stay uninitialised, with maps of earlier calls in
// them.
extern thread_local std::vector<uint64_t> fresh_maps;

// Checks a launch as a driver would, whatever the kernel, and writes it down.
int Launch(const char* api, const Kernel* kernel, dim3 grid, dim3 block, size_t shared_bytes,
           void* stream, const LaunchAttribute* attributes, unsigned attribute_count,
           void* const* arguments);

}  // namespace recording

#endif  // JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_STATE_H_
