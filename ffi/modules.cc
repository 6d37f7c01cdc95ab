#include "modules.h"

#include <dlfcn.h>

#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>

#include "sha256.h"

namespace jax_nvfp4_moe {
namespace {

std::mutex registry_mutex;

std::map<std::string, std::unique_ptr<Module>>& Registry() {
  // Never destroyed: calls may still run while the process ends.
  static auto* registry = new std::map<std::string, std::unique_ptr<Module>>;
  return *registry;
}

thread_local Module* current_module = nullptr;

template <typename Function>
void SymbolOf(void* library, const char* name, Function& found) {
  found = reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

Module::Module(std::string name, std::string path, std::string tvm_ffi, std::string cubins)
    : name_(std::move(name)),
      path_(std::move(path)),
      tvm_ffi_path_(std::move(tvm_ffi)),
      cubins_(std::move(cubins)) {}

Module& Module::Find(const std::string& name) {
  std::lock_guard lock(registry_mutex);
  const auto found = Registry().find(name);
  if (found == Registry().end()) {
    throw Failure(ErrorCode::kFailedPrecondition,
                  "module " + name + " is not registered in this process");
  }
  return *found->second;
}

void Module::Open() {
  // Throwing leaves the flag unset, so that a later call tries again.
  std::call_once(opened_, [this] {
    const TvmFfi& tvm_ffi = TvmFfi::Open(tvm_ffi_path_);
    void* library = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      throw Failure(ErrorCode::kFailedPrecondition, "module " + name_ + ": " + dlerror());
    }
    cuda_ = Cuda::Of(library);
    // flashinfer-python@0.6.13:data/include/flashinfer/cubin_loader.h
    void (*set_callback)(void (*)(const char*, const char*)) = nullptr;
    SymbolOf(library, "FlashInferSetCubinCallback", set_callback);
    SymbolOf(library, "FlashInferSetCurrentCubin", set_current_cubin_);
    if (set_callback != nullptr) set_callback(&Module::LoadCubin);
    library_ = library;
    tvm_ffi_ = &tvm_ffi;
  });
}

TVMFFISafeCallType Module::Function(const std::string& function) const {
  void* found = dlsym(library_, ("__tvm_ffi_" + function).c_str());
  if (found == nullptr) {
    throw Failure(ErrorCode::kFailedPrecondition, "module " + name_ + " has no " + function);
  }
  return reinterpret_cast<TVMFFISafeCallType>(found);
}

// FlashInfer's callback. It throws, as a callback of a C library must not: FlashInfer calls it from
// C++, turns exceptions into errors of the call, and has no other way to learn of a failure.
// Without an exception it would load the previous image in place of this one
// (flashinfer-python@0.6.13:data/include/flashinfer/cubin_loader.h:33-58).
void Module::LoadCubin(const char* path, const char* sha256) {
  Module* module = current_module;
  if (module == nullptr) throw std::runtime_error("an image was requested outside of a call");
  const std::string file = module->cubins_ + "/" + path;
  if (std::string(path).find("..") != std::string::npos) {
    throw std::runtime_error("an image was requested outside of its directory: " + file);
  }
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read the image " + file);
  const std::string image{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  const std::string digest = Sha256(image);
  if (digest != sha256) {
    throw std::runtime_error("the image " + file + " has the SHA-256 " + digest + ", expected " +
                             sha256);
  }
  if (image.size() > static_cast<size_t>(std::numeric_limits<int>::max())) {
    throw std::runtime_error("the image " + file + " has " + std::to_string(image.size()) +
                             " bytes, more than FlashInfer's loader takes");
  }
  module->set_current_cubin_(image.data(), static_cast<int>(image.size()));
}

Module::Current::Current(Module& module) : outer_(current_module) {
  current_module = &module;
}

Module::Current::~Current() { current_module = outer_; }

void Register(const std::string& name, const std::string& path, const std::string& tvm_ffi,
              const std::string& cubins) {
  std::lock_guard lock(registry_mutex);
  static auto* known = new std::map<std::string, std::string>;
  const std::string what = path + ", " + tvm_ffi + ", " + cubins;
  const auto [place, fresh] = known->emplace(name, what);
  if (!fresh && place->second != what) {
    throw Failure(ErrorCode::kAlreadyExists,
                  "module " + name + " is registered already, with " + place->second +
                      "; the new paths are " + what);
  }
  if (fresh) Registry().emplace(name, std::make_unique<Module>(name, path, tvm_ffi, cubins));
}

}  // namespace jax_nvfp4_moe
