// What XLA and Python call: the handlers of the target that calls any function of any module.
//
// Attributes: `module` and `function`, names; `program` and `arguments`, see program.h. The last
// result is the workspace, u8 [bytes]; the others are the program's.

#include <shared_mutex>
#include <string>

#include "call_arguments.h"
#include "call_site.h"
#include "cuda_runtime.h"
#include "failure.h"
#include "invoke.h"
#include "modules.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {
namespace {

namespace ffi = xla::ffi;

// Before anything runs, and never while XLA records a graph.
ffi::Error Initialize(CallSite* site, int32_t ordinal, ffi::RemainingArgs args,
                      ffi::RemainingRets rets) try {
  site->Resolve();
  const CurrentDevice current(site->home->cuda(), ordinal);
  const DLDevice device = {kDLCUDA, ordinal};
  LoadKernels(*site, device, [&](void* stream) {
    CallArguments arguments(*site, device, args, rets);
    Invoke(*site, device, stream, arguments);
  });
  return ffi::Error::Success();
} catch (...) {
  return CurrentError(site->function + ": ");
}

ffi::Error Execute(CallSite* site, int32_t ordinal, void* stream, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) try {
  site->Resolve();
  const CurrentDevice current(site->home->cuda(), ordinal);
  const DLDevice device = {kDLCUDA, ordinal};
  CallArguments arguments(*site, device, args, rets);
  std::shared_lock lock(site->home->kernels());
  Invoke(*site, device, stream, arguments);
  return ffi::Error::Success();
} catch (...) {
  return CurrentError(site->function + ": ");
}

}  // namespace

// ------------------------------------------------------------------------------ what Python opens

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED ffi::TypeId* jax_nvfp4_moe_call_site_id() { return &CallSite::id; }

EXPORTED ffi::TypeInfo* jax_nvfp4_moe_call_site_info() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<CallSite>();
  return &info;
}

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_instantiate(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::BindInstantiate().Attrs().To(MakeCallSite).release();
  return handler->Call(frame);
}

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_initialize(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                             .Ctx<ffi::State<CallSite>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .To(Initialize)
                             .release();
  return handler->Call(frame);
}

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_execute(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::State<CallSite>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::PlatformStream<void*>>()
                             .RemainingArgs()
                             .RemainingRets()
                             .To(Execute, {ffi::Traits::kCmdBufferCompatible})
                             .release();
  return handler->Call(frame);
}

// Registers a module. Returns null, or the reason for a failure, valid until this thread's next
// call.
EXPORTED const char* jax_nvfp4_moe_register_module(const char* name, const char* path,
                                                   const char* tvm_ffi, const char* cubins) {
  thread_local std::string message;
  try {
    Register(name, path, tvm_ffi, cubins);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace jax_nvfp4_moe
