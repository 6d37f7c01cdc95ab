// FlashInfer's cubin callback (its cubin_loader.h): hands it the prebuilt kernels of a directory.
//
// It has to be C++: FlashInfer reuses the previous kernel if a callback returns without giving one,
// and an exception is all that stops it. Python's cannot pass through ctypes.

#include <fstream>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>

#include "log.h"
#include "sha256.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using SetCurrentCubin = void (*)(const char* binary, int size);

std::mutex mutex;
std::string directory;
SetCurrentCubin set_current_cubin = nullptr;

}  // namespace

// Where the kernels are, and the module's FlashInferSetCurrentCubin.
EXPORT void rec_use_cubins(const char* where, SetCurrentCubin set_current) {
  std::lock_guard<std::mutex> lock(mutex);
  directory = where;
  set_current_cubin = set_current;
}

// For FlashInferSetCubinCallback. `sha256` is that of the file, in hexadecimal. Throws if the file
// is not there or not the one meant.
EXPORT void rec_cubin_callback(const char* path, const char* sha256) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!set_current_cubin) throw std::runtime_error("rec_use_cubins was not called");
  const std::string file = directory + "/" + path;
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::runtime_error("no cubin " + file);
  const std::string binary{std::istreambuf_iterator<char>(stream),
                           std::istreambuf_iterator<char>()};
  const std::string found = jax_nvfp4_moe::Sha256(binary);
  recording::Log::Get().Write(recording::Entry("cubin").Add("path", path).Add("sha256", found));
  if (found != sha256) {
    throw std::runtime_error("cubin " + file + " has sha256 " + found + ", not " + sha256);
  }
  set_current_cubin(binary.data(), static_cast<int>(binary.size()));
}
