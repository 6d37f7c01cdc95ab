// The bridge's calls on the host, for tests alone: compiled with the sources in ffi/ into a library of
// its own (host.py). XLA's buffers are tensors of the CPU, or are presented as a GPU's to functions
// that do not read them.

#include <atomic>
#include <cstdint>
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

// How buffers are presented.
std::atomic<int> device_type = kDLCPU;
std::atomic<void*> stream = nullptr;
// Returns another address for a buffer, from the argument's name, its address and its bytes.
std::atomic<void* (*)(const char*, void*, size_t)> address = nullptr;

void Present(const std::string& name, DLTensor& tensor) {
  const auto other = address.load();
  if (other == nullptr) return;
  size_t bits = size_t{tensor.dtype.bits} * tensor.dtype.lanes;
  for (int i = 0; i < tensor.ndim; ++i) bits *= tensor.shape[i];
  tensor.data = other(name.c_str(), tensor.data, (bits + 7) / 8);
}

// XLA's CPU backend has no stage before the first execution, so the first call loads kernels.
ffi::Error Execute(CallSite* site, int32_t ordinal, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) try {
  site->Resolve();
  const auto type = static_cast<DLDeviceType>(device_type.load());
  const DLDevice device = {type, type == kDLCPU ? 0 : ordinal};
  const CurrentDevice current(site->home->cuda(), ordinal);
  const auto invoke = [&](void* on) {
    CallArguments arguments(*site, device, args, rets);
    for (size_t i = 0; i < site->arguments.size(); ++i) {
      const TVMFFIAny& value = arguments.values()[i];
      if (value.type_index != kTVMFFIDLTensorPtr) continue;
      Present(site->arguments[i].name, *static_cast<DLTensor*>(value.v_ptr));
    }
    Present("workspace", arguments.workspace());
    Invoke(*site, device, on, arguments);
  };
  if (type != kDLCPU) LoadKernels(*site, device, invoke);
  std::shared_lock lock(site->home->kernels());
  invoke(stream.load());
  return ffi::Error::Success();
} catch (...) {
  return CurrentError(site->function + ": ");
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED ffi::TypeId* host_call_site_id() { return &CallSite::id; }

EXPORTED ffi::TypeInfo* host_call_site_info() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<CallSite>();
  return &info;
}

EXPORTED XLA_FFI_Error* host_instantiate(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::BindInstantiate().Attrs().To(MakeCallSite).release();
  return handler->Call(frame);
}

EXPORTED XLA_FFI_Error* host_execute(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::State<CallSite>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .To(Execute)
                             .release();
  return handler->Call(frame);
}

// This library's own registry of modules.
EXPORTED const char* host_register_module(const char* name, const char* path, const char* tvm_ffi,
                                          const char* cubins) {
  thread_local std::string message;
  try {
    Register(name, path, tvm_ffi, cubins);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

EXPORTED void host_present_as(int type, void* on, void* (*other)(const char*, void*, size_t)) {
  device_type = type;
  stream = on;
  address = other;
}

}  // namespace jax_nvfp4_moe
