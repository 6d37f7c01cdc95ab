// The half of the stand-in that is libcuda.so.1's: prebuilt kernels and tensor maps.
//
// Its functions do not set cudaGetLastError's error, as the real ones do not.

#include <cstring>

#include "log.h"
#include "sha256.h"
#include "state.h"

using namespace recording;

namespace {

// What cuTensorMapEncodeTiled writes into a CUtensorMap (cuda.h: 128 opaque bytes). Our own layout;
// launches.py reads it. The address is first, so that it is found among a kernel's parameters.
struct EncodedMap {
  void* address;
  char magic[8];
  uint64_t serial;
  uint8_t data_type, rank, interleave, swizzle, l2_promotion, oob_fill, unused[2];
  uint64_t dims[5], strides[4];
  uint32_t box[5];
};
static_assert(sizeof(EncodedMap) <= 128);

std::atomic<uint64_t> map_serial{0};

// cuda.h cuThreadExchangeStreamCaptureMode: calls that a capture of another thread (global mode) or
// of this one (unless relaxed) forbids.
bool CaptureForbids() {
  std::lock_guard<std::mutex> lock(GetState().mutex);
  for (const auto& [stream, capture] : GetState().captures) {
    if (capture.mode == kCaptureGlobal) return true;
    if (capture.mode == kCaptureThreadLocal && capture.thread == ThreadName()) return true;
  }
  return false;
}

}  // namespace

// --- Contexts -----------------------------------------------------------------------------------

EXPORT int cuCtxGetCurrent(void** context) {
  // One primary context per device; nobody looks behind the handle.
  *context = reinterpret_cast<void*>(static_cast<uintptr_t>(current_device) + 1);
  return kSuccess;
}

EXPORT int cuCtxGetId(void* context, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(context);
  return kSuccess;
}

EXPORT int cuGetErrorString(int error, const char** text) {
  *text = Describe(error);
  return kSuccess;
}

// --- Prebuilt kernels ---------------------------------------------------------------------------

namespace recording {

Kernel* Loaded(const void* function) {
  std::lock_guard<std::mutex> lock(GetState().mutex);
  if (!GetState().functions.count(function)) return nullptr;
  return static_cast<Kernel*>(const_cast<void*>(function));
}

int LoadImage(const char* api, void** handle, const void* image) {
  *handle = nullptr;
  const void* cubin = image ? CubinOf(image) : nullptr;
  int status = cubin ? kSuccess : kInvalidImage;
  if (CaptureForbids()) status = kCaptureUnsupported;
  Entry entry("module_load");
  entry.Add("api", api).Add("status", status).Add("device", current_device);
  if (status == kSuccess) {
    const uint64_t bytes = CubinSize(cubin);
    auto* module = new Module{jax_nvfp4_moe::Sha256({static_cast<const char*>(cubin), bytes}),
                              KernelsOfCubin(cubin),
                              SharedOfCubin(cubin),
                              {}};
    entry.Add("bytes", bytes).Add("sha256", module->sha256);
    std::lock_guard<std::mutex> lock(GetState().mutex);
    GetState().modules.insert(module);
    *handle = module;
  }
  Log::Get().Write(entry);
  return status;
}

int FindFunction(void** function, void* handle, const char* name) {
  std::lock_guard<std::mutex> lock(GetState().mutex);
  auto* module = static_cast<Module*>(handle);
  if (!GetState().modules.count(module)) return kInvalidValue;
  const Parameters* parameters = ParametersIn(module->kernels, name);
  if (!parameters) return kNotFound;
  Kernel& kernel = module->functions[name];
  kernel.name = name;
  kernel.parameters = parameters;
  if (const auto shared = module->static_shared.find(name); shared != module->static_shared.end()) {
    kernel.static_shared = static_cast<int>(shared->second);
  }
  GetState().functions.insert(&kernel);
  *function = &kernel;
  return kSuccess;
}

int Unload(void* handle) {
  auto* module = static_cast<Module*>(handle);
  std::lock_guard<std::mutex> lock(GetState().mutex);
  if (!GetState().modules.erase(module)) return kInvalidValue;
  for (auto& [name, kernel] : module->functions) GetState().functions.erase(&kernel);
  Log::Get().Write(Entry("module_unload").Add("sha256", module->sha256));
  delete module;
  return kSuccess;
}

}  // namespace recording

EXPORT int cuModuleLoadData(void** handle, const void* image) {
  return LoadImage("cuModuleLoadData", handle, image);
}

EXPORT int cuModuleGetFunction(void** function, void* handle, const char* name) {
  return FindFunction(function, handle, name);
}

EXPORT int cuModuleUnload(void* handle) { return Unload(handle); }

EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  Kernel* kernel = Loaded(function);
  return kernel ? SetAttribute(*kernel, attribute, value, current_device)
                : int{kInvalidDeviceFunction};
}

EXPORT int cuLaunchKernelEx(const CUlaunchConfig* config, void* function, void** arguments,
                            void**) {
  return Launch("cuLaunchKernelEx", Loaded(function),
                {config->grid_x, config->grid_y, config->grid_z},
                {config->block_x, config->block_y, config->block_z}, config->shared_bytes,
                config->stream, config->attributes, config->attribute_count, arguments);
}

// --- Tensor maps --------------------------------------------------------------------------------

namespace {

// cuda.h, documentation of cuTensorMapEncodeTiled: what it refuses.
bool ValidMap(const void* map, int data_type, unsigned rank, uintptr_t address,
              const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
              const uint32_t* element_strides) {
  const bool padded = data_type >= 14;  // CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B, 16U6_ALIGN16B
  const uint64_t alignment = padded ? 32 : 16;
  if (reinterpret_cast<uintptr_t>(map) % 64 || rank < 1 || rank > 5) return false;
  if (!address || address % alignment) return false;
  for (unsigned i = 0; i < rank; ++i) {
    if (!dims[i] || dims[i] > uint64_t{1} << 32 || !box[i] || box[i] > 256) return false;
    if (!element_strides[i] || element_strides[i] > 8) return false;
    if (i + 1 < rank && (strides[i] % alignment || strides[i] >= uint64_t{1} << 40)) return false;
  }
  return true;
}

}  // namespace

EXPORT int cuTensorMapEncodeTiled(void* map, int data_type, unsigned rank, void* address,
                                  const uint64_t* dims, const uint64_t* strides,
                                  const uint32_t* box, const uint32_t* element_strides,
                                  int interleave, int swizzle, int l2_promotion, int oob_fill) {
  const bool valid = ValidMap(map, data_type, rank, reinterpret_cast<uintptr_t>(address), dims,
                              strides, box, element_strides);
  Entry entry("tensor_map");
  entry.Add("status", valid ? int{kSuccess} : int{kInvalidValue})
      .Add("data_type", data_type)
      .Add("address", address)
      .Add("rank", rank);
  if (rank >= 1 && rank <= 5) {
    entry.Add("dims", std::vector<uint64_t>(dims, dims + rank))
        .Add("strides", std::vector<uint64_t>(strides, strides + rank - 1))
        .Add("box", std::vector<uint64_t>(box, box + rank));
  }
  Log::Get().Write(entry);
  if (!valid) return kInvalidValue;

  EncodedMap encoded{};
  encoded.address = address;
  std::memcpy(encoded.magic, "RECTMAP", 8);
  encoded.serial = ++map_serial;
  encoded.data_type = static_cast<uint8_t>(data_type);
  encoded.rank = static_cast<uint8_t>(rank);
  encoded.interleave = static_cast<uint8_t>(interleave);
  encoded.swizzle = static_cast<uint8_t>(swizzle);
  encoded.l2_promotion = static_cast<uint8_t>(l2_promotion);
  encoded.oob_fill = static_cast<uint8_t>(oob_fill);
  std::memcpy(encoded.dims, dims, rank * sizeof *dims);
  std::memcpy(encoded.strides, strides, (rank - 1) * sizeof *strides);
  std::memcpy(encoded.box, box, rank * sizeof *box);
  std::memset(map, 0, 128);
  std::memcpy(map, &encoded, sizeof encoded);
  fresh_maps.push_back(encoded.serial);
  return kSuccess;
}
