// What libcute_dsl_runtime.so has and CuTe-DSL's archive of the same functions has not.

#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

// How a function that CuTe-DSL compiled says that a CUDA call failed. It hands over
// TVMFFIErrorSetRaisedFromCStrParts (tvm/ffi/c_api.h), since the real library is not linked to TVM-FFI.
EXPORT void CuteDSLRT_TVMFFISetRaisedCudaError(void (*set_raised)(const char* kind,
                                                                  const char** parts, int count),
                                               int status) {
  const std::string text = "CUDA error " + std::to_string(status);
  const char* parts[] = {text.c_str()};
  set_raised("RuntimeError", parts, 1);
}
