#include "cuda_runtime.h"

#include <dlfcn.h>

#include <string>

#include "failure.h"

namespace jax_nvfp4_moe {
namespace {

template <typename Function>
void Find(void* library, const char* name, Function& found) {
  found = reinterpret_cast<Function>(dlsym(library, name));
}

void Check(const Cuda& cuda, int status, const std::string& call) {
  if (status == 0) return;
  throw Failure(ErrorCode::kInternal, call + ": " + cuda.get_error_string(status));
}

}  // namespace

Cuda Cuda::Of(void* library) {
  Cuda cuda;
  Find(library, "cudaGetDevice", cuda.get_device);
  Find(library, "cudaSetDevice", cuda.set_device);
  Find(library, "cudaStreamCreateWithFlags", cuda.stream_create_with_flags);
  Find(library, "cudaStreamDestroy", cuda.stream_destroy);
  Find(library, "cudaStreamBeginCapture", cuda.stream_begin_capture);
  Find(library, "cudaStreamEndCapture", cuda.stream_end_capture);
  Find(library, "cudaGraphDestroy", cuda.graph_destroy);
  Find(library, "cudaGetErrorString", cuda.get_error_string);
  return cuda;
}

CurrentDevice::CurrentDevice(const Cuda& cuda, int ordinal) : cuda_(cuda) {
  if (cuda.set_device == nullptr || cuda.get_device == nullptr) return;
  cuda.get_device(&previous_);
  if (previous_ == ordinal) return;
  Check(cuda, cuda.set_device(ordinal), "cudaSetDevice(" + std::to_string(ordinal) + ")");
  changed_ = true;
}

CurrentDevice::~CurrentDevice() {
  if (changed_) cuda_.set_device(previous_);
}

DiscardedCapture::DiscardedCapture(const Cuda& cuda) : cuda_(cuda) {
  constexpr unsigned kNonBlocking = 1;  // cudaStreamNonBlocking
  constexpr int kRelaxed = 2;           // cudaStreamCaptureModeRelaxed, which allows loading
  Check(cuda, cuda.stream_create_with_flags(&stream_, kNonBlocking), "cudaStreamCreateWithFlags");
  if (const int status = cuda.stream_begin_capture(stream_, kRelaxed)) {
    cuda.stream_destroy(stream_);
    Check(cuda, status, "cudaStreamBeginCapture");
  }
}

DiscardedCapture::~DiscardedCapture() {
  void* graph = nullptr;
  if (cuda_.stream_end_capture(stream_, &graph) == 0 && graph != nullptr) {
    cuda_.graph_destroy(graph);
  }
  cuda_.stream_destroy(stream_);
}

}  // namespace jax_nvfp4_moe
