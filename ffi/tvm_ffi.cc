#include "tvm_ffi.h"

#include <dlfcn.h>

#include <mutex>
#include <optional>

namespace jax_nvfp4_moe {
namespace {

template <typename Function>
Function Symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) {
    throw Failure(ErrorCode::kFailedPrecondition, std::string("libtvm_ffi has no ") + name);
  }
  return reinterpret_cast<Function>(found);
}

std::string Text(const TVMFFIByteArray& bytes) { return std::string(bytes.data, bytes.size); }

// Python's names of errors, which FlashInfer's and TVM-FFI's checks raise.
ErrorCode CodeOf(const std::string& kind) {
  if (kind == "ValueError" || kind == "TypeError" || kind == "IndexError") {
    return ErrorCode::kInvalidArgument;
  }
  if (kind == "NotImplementedError") return ErrorCode::kUnimplemented;
  if (kind == "MemoryError") return ErrorCode::kResourceExhausted;
  return ErrorCode::kInternal;
}

}  // namespace

const TvmFfi& TvmFfi::Open(const std::string& path) {
  static std::mutex mutex;
  static std::optional<TvmFfi> opened;
  static std::string opened_path;
  std::lock_guard lock(mutex);
  if (opened) {
    if (path != opened_path) {
      throw Failure(ErrorCode::kFailedPrecondition,
                    "libtvm_ffi is open from " + opened_path + " already, not from " + path);
    }
    return *opened;
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    throw Failure(ErrorCode::kFailedPrecondition, std::string("libtvm_ffi: ") + dlerror());
  }
  opened.emplace(TvmFfi{
      Symbol<decltype(object_dec_ref)>(library, "TVMFFIObjectDecRef"),
      Symbol<decltype(function_get_global)>(library, "TVMFFIFunctionGetGlobal"),
      Symbol<decltype(function_call)>(library, "TVMFFIFunctionCall"),
      Symbol<decltype(error_move_from_raised)>(library, "TVMFFIErrorMoveFromRaised"),
      Symbol<decltype(env_set_stream)>(library, "TVMFFIEnvSetStream"),
      Symbol<decltype(env_set_allocator)>(library, "TVMFFIEnvSetDLPackManagedTensorAllocator"),
  });
  opened_path = path;
  return *opened;
}

Failure TvmFfi::Raised() const {
  TVMFFIObjectHandle error = nullptr;
  error_move_from_raised(&error);
  if (error == nullptr) return Failure(ErrorCode::kInternal, "failed and did not say why");
  // The cell follows the object's header (tvm/ffi/c_api.h, TVMFFIErrorCell).
  const auto* object = static_cast<const TVMFFIObject*>(error);
  const auto* cell = reinterpret_cast<const TVMFFIErrorCell*>(object + 1);
  const std::string kind = Text(cell->kind);
  Failure failure(CodeOf(kind), kind + ": " + Text(cell->message));
  object_dec_ref(error);
  return failure;
}

TVMFFIObject* TvmFfi::IntArray(const std::vector<int64_t>& values) const {
  constexpr char kName[] = "ffi.Array";
  const TVMFFIByteArray name{kName, sizeof(kName) - 1};
  TVMFFIObjectHandle function = nullptr;
  if (function_get_global(&name, &function) != 0) throw Raised();
  std::vector<TVMFFIAny> args(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    args[i] = TVMFFIAny{};
    args[i].type_index = kTVMFFIInt;
    args[i].v_int64 = values[i];
  }
  TVMFFIAny array{};
  const int status = function_call(function, args.data(), static_cast<int>(args.size()), &array);
  object_dec_ref(function);
  if (status != 0) throw Raised();
  return array.v_obj;
}

Environment::Environment(const TvmFfi& tvm_ffi, DLDevice device, void* stream,
                         DLPackManagedTensorAllocator allocator)
    : tvm_ffi_(tvm_ffi), device_(device) {
  // TVM-FFI keeps streams of devices with streams alone.
  if (device.device_type != kDLCPU &&
      tvm_ffi.env_set_stream(device.device_type, device.device_id, stream, &stream_) != 0) {
    throw tvm_ffi.Raised();
  }
  tvm_ffi.env_set_allocator(allocator, /*write_to_global_context=*/0, &allocator_);
}

Environment::~Environment() {
  // Null is restored too: a later caller on this thread must not find XLA's stream.
  tvm_ffi_.env_set_allocator(allocator_, /*write_to_global_context=*/0, nullptr);
  if (device_.device_type != kDLCPU) {
    tvm_ffi_.env_set_stream(device_.device_type, device_.device_id, stream_, nullptr);
  }
}

}  // namespace jax_nvfp4_moe
