// Images handed over as libraries, which CuTe-DSL's runtime does: the CUDA runtime's names for what
// driver.cpp does with modules, and what it asks the driver beside them.
//
// A cudaKernel_t is a CUkernel, and runtime.cpp takes one wherever it takes a host function
// (CUDA Runtime API, cudaFuncSetAttribute and cudaLaunchKernelExC).

#include "log.h"
#include "state.h"

using namespace recording;

EXPORT int cudaLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*,
                               void**, unsigned) {
  return Failed(LoadImage("cudaLibraryLoadData", library, code));
}

EXPORT int cudaLibraryGetKernel(void** kernel, void* library, const char* name) {
  return Failed(FindFunction(kernel, library, name));
}

EXPORT int cudaLibraryUnload(void* library) { return Failed(Unload(library)); }

EXPORT int cudaKernelSetAttributeForDevice(void* kernel, int attribute, int value, int ordinal) {
  Kernel* found = Loaded(kernel);
  if (!found) return Failed(kInvalidDeviceFunction);
  if (ordinal < 0 || ordinal >= GetDevice().count) return Failed(kInvalidDevice);
  return Failed(SetAttribute(*found, attribute, value, ordinal));
}

EXPORT int cuKernelGetAttribute(int* value, int attribute, void* kernel, int) {
  const Kernel* found = Loaded(kernel);
  if (!found) return kInvalidDeviceFunction;
  if (attribute != kSharedSize) {
    Log::Get().Write(Entry("unknown_attribute").Add("attribute", attribute));
    return kInvalidValue;
  }
  *value = found->static_shared;
  return kSuccess;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= GetDevice().count) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}
