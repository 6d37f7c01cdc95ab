// What CUDA 13's headers define, as far as it is needed here; each with the header it is from.

#ifndef JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_CUDA_TYPES_H_
#define JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_CUDA_TYPES_H_

#include <cstddef>
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct dim3 {  // vector_types.h
  unsigned x, y, z;
};

struct LaunchAttribute {  // driver_types.h cudaLaunchAttribute_st, cuda.h CUlaunchAttribute_st
  int id;
  char pad[4];
  char value[64];
};

struct cudaLaunchConfig_t {  // driver_types.h cudaLaunchConfig_st
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct CUlaunchConfig {  // cuda.h CUlaunchConfig_st
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct cudaPointerAttributes {  // driver_types.h
  int type, device;
  void *device_pointer, *host_pointer;
  long reserved[8];
};

enum {  // driver_types.h cudaError and cuda.h CUresult; the numbers agree where both have one.
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,  // No CUresult.
  kInvalidDeviceFunction = 98,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kNotFound = 500,
  kNotSupported = 801,
  kInvalidClusterSize = 912,
  kCaptureUnsupported = 900,
  kIllegalState = 401,
};

enum {  // driver_types.h cudaDeviceAttr
  kMaxThreadsPerBlock = 1,
  kMaxSharedMemoryPerBlock = 8,
  kWarpSize = 10,
  kMultiProcessorCount = 16,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerMultiprocessor = 81,
  kCooperativeLaunch = 95,
  kMaxSharedMemoryPerBlockOptin = 97,
};

// cuda.h CUfunction_attribute; the second is driver_types.h cudaFuncAttribute's too.
constexpr int kSharedSize = 1, kMaxDynamicSharedSize = 8;

// driver_types.h cudaLaunchAttributeID, cuda.h CUlaunchAttributeID
constexpr int kLaunchClusterDimension = 4;

// CUDA C++ Programming Guide, technical specifications of compute capability 10.x.
constexpr int kSharedPerBlock = 48 << 10, kSharedPerBlockOptin = 227 << 10;
constexpr int kSharedPerMultiprocessor = 228 << 10, kThreadsPerBlock = 1024;
constexpr unsigned kGridX = 0x7fffffff, kGridYZ = 65535;

// driver_types.h cudaStreamCaptureMode and cudaStreamCaptureStatus
enum { kCaptureGlobal = 0, kCaptureThreadLocal = 1, kCaptureRelaxed = 2 };
enum { kNotCapturing = 0, kCapturing = 1 };

#endif  // JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_CUDA_TYPES_H_
