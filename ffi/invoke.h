// Calls a call site's function, and loads the kernels that it will launch.

#ifndef JAX_NVFP4_MOE_INVOKE_H_
#define JAX_NVFP4_MOE_INVOKE_H_

#include <dlpack/dlpack.h>

#include <functional>

#include "call_arguments.h"
#include "call_site.h"

namespace jax_nvfp4_moe {

// Calls the function once, with `stream` as the device's stream. Throws Failure.
void Invoke(CallSite& site, DLDevice device, void* stream, CallArguments& arguments);

// Loads what the call launches, once for each device: calls `invoke` on a stream whose work is
// recorded and discarded. XLA may record the real call into a graph, when nothing can be loaded.
// Does nothing for a module that is not linked to a CUDA runtime.
//
// Throws Failure, and what `invoke` throws; the next call then tries again.
void LoadKernels(CallSite& site, DLDevice device, const std::function<void(void* stream)>& invoke);

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_INVOKE_H_
