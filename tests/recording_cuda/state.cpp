#include "state.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "log.h"

namespace recording {

const Device& GetDevice() {
  static const Device instance = [] {
    Device found{10, 0, 148, 8};
    if (const char* text = std::getenv("RECORDING_CUDA_CAPABILITY")) {
      if (std::sscanf(text, "%d.%d", &found.major, &found.minor) != 2) {
        std::fprintf(stderr, "RECORDING_CUDA_CAPABILITY=%s is not like 10.0\n", text);
        std::abort();
      }
    }
    if (const char* text = std::getenv("RECORDING_CUDA_MULTIPROCESSORS")) {
      found.multiprocessors = std::atoi(text);
    }
    if (const char* text = std::getenv("RECORDING_CUDA_DEVICES")) found.count = std::atoi(text);
    return found;
  }();
  return instance;
}

thread_local int current_device = 0;
thread_local int last_error = kSuccess;
thread_local std::vector<uint64_t> fresh_maps;

int Failed(int error) {
  if (error != kSuccess) last_error = error;
  return error;
}

const char* Describe(int error) {
  switch (error) {
    case kSuccess: return "no error";
    case kInvalidValue: return "invalid argument";
    case kInvalidConfiguration: return "invalid configuration argument";
    case kInvalidDeviceFunction: return "invalid device function";
    case kInvalidDevice: return "invalid device ordinal";
    case kInvalidImage: return "device kernel image is invalid";
    case kNotFound: return "named symbol not found";
    case kNotSupported:
      return "refused: the recording runtime has no memory and nothing to wait for";
    case kCaptureUnsupported: return "operation not permitted when stream is capturing";
    case kInvalidClusterSize: return "cluster misconfiguration";
    case kIllegalState: return "the operation cannot be performed in the present state";
    default: return "an error that the recording runtime never returns";
  }
}

int Refuse(const char* api, uint64_t bytes, const void* stream) {
  Log::Get().Write(Entry("refused")
                       .Add("api", api)
                       .Add("bytes", bytes)
                       .Add("stream", stream)
                       .Add("device", current_device));
  return Failed(kNotSupported);
}

State& GetState() {
  static auto* instance = new State;
  return *instance;
}

const Parameters* ParametersIn(const Kernels& kernels, const std::string& name) {
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : &found->second;
}

int SetAttribute(Kernel& kernel, int attribute, int value, int device) {
  if (attribute == kMaxDynamicSharedSize) {
    if (value < 0 || value > kSharedPerBlockOptin - kernel.static_shared) return kInvalidValue;
    std::lock_guard<std::mutex> lock(GetState().mutex);
    kernel.max_dynamic_shared[device] = value;
  }
  return kSuccess;
}

namespace {

int Check(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > kGridX) return kInvalidConfiguration;
  if (grid.y > kGridYZ || grid.z > kGridYZ) return kInvalidConfiguration;
  if (!threads || threads > kThreadsPerBlock) return kInvalidConfiguration;
  std::lock_guard<std::mutex> lock(GetState().mutex);
  const auto set = kernel.max_dynamic_shared.find(current_device);
  const int most = set == kernel.max_dynamic_shared.end() ? kSharedPerBlock : set->second;
  return shared_bytes > static_cast<size_t>(most) ? int{kInvalidValue} : int{kSuccess};
}

// A grid has whole clusters (CUDA C++ Programming Guide, thread block clusters).
int CheckCluster(dim3 grid, const LaunchAttribute* attributes, unsigned attribute_count) {
  for (unsigned i = 0; i < attribute_count; ++i) {
    if (attributes[i].id != kLaunchClusterDimension) continue;
    dim3 cluster;
    std::memcpy(&cluster, attributes[i].value, sizeof cluster);
    if (!cluster.x || !cluster.y || !cluster.z) return kInvalidClusterSize;
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) return kInvalidClusterSize;
  }
  return kSuccess;
}

// Counts a launch if its stream is being captured; returns whether it is.
bool Captured(const void* stream) {
  std::lock_guard<std::mutex> lock(GetState().mutex);
  const auto found = GetState().captures.find(stream);
  if (found == GetState().captures.end()) return false;
  ++found->second.launches;
  return true;
}

}  // namespace

int Launch(const char* api, const Kernel* kernel, dim3 grid, dim3 block, size_t shared_bytes,
           void* stream, const LaunchAttribute* attributes, unsigned attribute_count,
           void* const* arguments) {
  int status = kernel ? Check(*kernel, grid, block, shared_bytes) : int{kInvalidDeviceFunction};
  if (status == kSuccess) status = CheckCluster(grid, attributes, attribute_count);
  Entry entry("launch");
  entry.Add("api", api)
      .Add("name", kernel ? kernel->name : "")
      .Add("status", status)
      .Add("device", current_device)
      .Add("stream", stream)
      .Add("captured", int{Captured(stream)})
      .Add("grid", std::vector<uint64_t>{grid.x, grid.y, grid.z})
      .Add("block", std::vector<uint64_t>{block.x, block.y, block.z})
      .Add("shared_bytes", shared_bytes);

  std::vector<uint64_t> ids;
  std::string values;
  for (unsigned i = 0; i < attribute_count; ++i) {
    ids.push_back(static_cast<uint64_t>(attributes[i].id));
    values += Hex(attributes[i].value, sizeof attributes[i].value);
  }
  entry.Add("attribute_ids", ids).Add("attribute_values", values).Add("fresh_maps", fresh_maps);
  fresh_maps.clear();

  if (kernel && kernel->parameters) {
    std::string bytes;
    for (size_t i = 0; i < kernel->parameters->size(); ++i) {
      const auto& parameter = (*kernel->parameters)[i];
      bytes.resize(2 * parameter.offset, '0');  // Padding between parameters.
      bytes += Hex(arguments[i], parameter.size);
    }
    entry.Add("parameter_bytes", bytes);
  } else {
    entry.AddNull("parameter_bytes");
  }
  Log::Get().Write(entry);
  return status;
}

}  // namespace recording

// --- The log, for Python and for other libraries ------------------------------------------------

EXPORT void rec_write(const char* json) { recording::Log::Get().Write(std::string(json)); }

EXPORT uint64_t rec_count() { return recording::Log::Get().Size(); }

// Copies at most `capacity` bytes of entry `index`, JSON without a final zero; returns its length,
// or -1 if there is no such entry.
EXPORT int64_t rec_fetch(uint64_t index, char* out, uint64_t capacity) {
  return recording::Log::Get().Copy(index, out, capacity);
}

EXPORT void rec_clear() { recording::Log::Get().Clear(); }
