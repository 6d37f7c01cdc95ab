#include "invoke.h"

#include <mutex>
#include <shared_mutex>
#include <string>

#include "arena.h"
#include "cuda_runtime.h"
#include "failure.h"
#include "tvm_ffi.h"

namespace jax_nvfp4_moe {

void Invoke(CallSite& site, DLDevice device, void* stream, CallArguments& arguments) {
  const TvmFfi& tvm_ffi = site.home->tvm_ffi();
  Arena arena(arguments.workspace().data, arguments.workspace_bytes(), device);
  Environment environment(tvm_ffi, device, stream, &Arena::Allocate);
  Module::Current current(*site.home);
  TVMFFIAny returned{};
  const auto count = static_cast<int32_t>(arguments.values().size());
  if (site.callee(nullptr, arguments.values().data(), count, &returned) != 0) {
    throw tvm_ffi.Raised();
  }
  // Results are in the caller's own buffers; a returned object may hold parts of the workspace.
  if (returned.type_index >= kTVMFFIStaticObjectBegin) tvm_ffi.object_dec_ref(returned.v_obj);
  if (arena.live() != 0) {
    throw Failure(ErrorCode::kInternal, "it kept " + std::to_string(arena.live()) +
                                            " tensors of the workspace after it returned");
  }
}

void LoadKernels(CallSite& site, DLDevice device, const std::function<void(void*)>& invoke) {
  std::lock_guard once(site.loaded_mutex);
  if (site.loaded.count(device.device_id) != 0) return;
  const Cuda& cuda = site.home->cuda();
  if (cuda.stream_begin_capture != nullptr) {
    std::unique_lock lock(site.home->kernels());
    const DiscardedCapture capture(cuda);
    invoke(capture.stream());
  }
  site.loaded.insert(device.device_id);
}

}  // namespace jax_nvfp4_moe
