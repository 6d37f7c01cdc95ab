// The XLA FFI handlers: one target that calls any function of any module.
//
// Attributes: `module` and `function`, names; `program` and `arguments`, see program.h. The last result
// is the workspace, u8 [bytes]; the others are the program's.

#include <atomic>
#include <cstring>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "arena.h"
#include "failure.h"
#include "modules.h"
#include "program.h"
#include "tvm_ffi.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {
namespace {

namespace ffi = xla::ffi;

DLDataType DataTypeOf(ffi::DataType dtype, const std::string& name) {
  switch (dtype) {
    case ffi::DataType::PRED:
      return {kDLBool, 8, 1};
    case ffi::DataType::S8:
      return {kDLInt, 8, 1};
    case ffi::DataType::S16:
      return {kDLInt, 16, 1};
    case ffi::DataType::S32:
      return {kDLInt, 32, 1};
    case ffi::DataType::S64:
      return {kDLInt, 64, 1};
    case ffi::DataType::U8:
      return {kDLUInt, 8, 1};
    case ffi::DataType::U16:
      return {kDLUInt, 16, 1};
    case ffi::DataType::U32:
      return {kDLUInt, 32, 1};
    case ffi::DataType::U64:
      return {kDLUInt, 64, 1};
    case ffi::DataType::F16:
      return {kDLFloat, 16, 1};
    case ffi::DataType::F32:
      return {kDLFloat, 32, 1};
    case ffi::DataType::F64:
      return {kDLFloat, 64, 1};
    case ffi::DataType::BF16:
      return {kDLBfloat, 16, 1};
    case ffi::DataType::F8E4M3FN:
      return {kDLFloat8_e4m3fn, 8, 1};
    case ffi::DataType::F8E5M2:
      return {kDLFloat8_e5m2, 8, 1};
    case ffi::DataType::F8E8M0FNU:
      return {kDLFloat8_e8m0fnu, 8, 1};
    case ffi::DataType::F4E2M1FN:
      return {kDLFloat4_e2m1fn, 4, 1};
    default:
      throw Failure(ErrorCode::kInvalidArgument,
                    name + " has a data type that DLPack does not have, XLA's number " +
                        std::to_string(static_cast<int>(dtype)));
  }
}

// What a call site's attributes say, read when its executable is built.
struct CallSite {
  static ffi::TypeId id;

  std::string module;
  std::string function;
  std::vector<Argument> arguments;

  // What follows is set by the first call.
  std::once_flag resolved;
  Module* home = nullptr;
  TVMFFISafeCallType callee = nullptr;
  std::vector<TVMFFIObject*> lists;  // of the IntList arguments, in their order

  std::mutex warm_mutex;
  std::set<int> warm;  // devices on which its kernels are loaded

  ~CallSite() {
    for (TVMFFIObject* list : lists) home->tvm_ffi().object_dec_ref(list);
  }

  void Resolve() {
    std::call_once(resolved, [this] {
      Module& found = Module::Find(module);
      found.Open();
      callee = found.Function(function);
      home = &found;
      for (const Argument& argument : arguments) {
        if (const auto* list = std::get_if<IntList>(&argument.value)) {
          lists.push_back(found.tvm_ffi().IntArray(*list));
        }
      }
    });
  }
};

ffi::TypeId CallSite::id = {};

// The same under a second number. JAX's CPU backend and its CUDA plugin each number types on their own,
// and take a number that is there already for theirs: shared, it would be another type's in one of them.
struct HostCallSite : CallSite {
  static ffi::TypeId id;
};

ffi::TypeId HostCallSite::id = {};

// Where buffers are said to be, and whose stream it is.
struct Place {
  DLDevice device;
  void* stream;
};

// How buffers of the CPU are presented. Tests present them as a GPU's, to callees that never read them.
struct Host {
  std::atomic<int> device_type = kDLCPU;
  std::atomic<void*> stream = nullptr;
  // Gives another address for a buffer: argument's name, address, bytes.
  std::atomic<void* (*)(const char*, void*, size_t)> address = nullptr;
};

Host host;

// The tensors of one call. Shapes are XLA's own; strides have to be written out.
class Tensors {
 public:
  Tensors(size_t count, size_t dimensions) {
    tensors_.reserve(count);  // pointers into both are handed out
    strides_.reserve(dimensions);
  }

  DLTensor* Add(const ffi::AnyBuffer& buffer, const std::string& name, DLDevice device) {
    const auto dimensions = buffer.dimensions();
    const size_t start = strides_.size();
    strides_.resize(start + dimensions.size());
    WriteStrides(dimensions.begin(), dimensions.size(), strides_.data() + start);
    void* data = buffer.untyped_data();
    if (auto address = host.address.load(std::memory_order_relaxed)) {
      data = address(name.c_str(), data, buffer.size_bytes());
    }
    tensors_.push_back(DLTensor{data, device, static_cast<int32_t>(dimensions.size()),
                                DataTypeOf(buffer.element_type(), name),
                                const_cast<int64_t*>(dimensions.begin()), strides_.data() + start,
                                /*byte_offset=*/0});
    return &tensors_.back();
  }

 private:
  std::vector<DLTensor> tensors_;
  std::vector<int64_t> strides_;
};

TVMFFIAny Any(int32_t type_index) {
  TVMFFIAny any{};
  any.type_index = type_index;
  return any;
}

ffi::AnyBuffer OperandAt(const ffi::RemainingArgs& args, const Argument& argument, size_t index) {
  auto buffer = args.get<ffi::AnyBuffer>(index);
  if (buffer.has_error()) {
    throw Failure(ErrorCode::kInvalidArgument,
                  argument.name + " is operand " + std::to_string(index) + ", and there are " +
                      std::to_string(args.size()));
  }
  return *buffer;
}

ffi::AnyBuffer ResultAt(const ffi::RemainingRets& rets, const Argument& argument, size_t index) {
  // The last one is the workspace.
  if (index + 1 >= rets.size()) {
    throw Failure(ErrorCode::kInvalidArgument,
                  argument.name + " is result " + std::to_string(index) + ", and there are " +
                      std::to_string(rets.size() - 1) + " beside the workspace");
  }
  auto buffer = rets.get<ffi::AnyBuffer>(index);
  return **buffer;
}

// Calls the site's function once.
void Invoke(CallSite& site, Place place, const ffi::RemainingArgs& args,
            const ffi::RemainingRets& rets) {
  if (rets.size() == 0) {
    throw Failure(ErrorCode::kInvalidArgument, "there is no result: the last one is the workspace");
  }
  const ffi::AnyBuffer workspace = **rets.get<ffi::AnyBuffer>(rets.size() - 1);
  size_t dimensions = workspace.dimensions().size();
  for (const Argument& argument : site.arguments) {
    if (const auto* operand = std::get_if<Operand>(&argument.value)) {
      dimensions += OperandAt(args, argument, operand->index).dimensions().size();
    } else if (const auto* result = std::get_if<Result>(&argument.value)) {
      dimensions += ResultAt(rets, argument, result->index).dimensions().size();
    }
  }
  Tensors tensors(site.arguments.size() + 1, dimensions);
  std::vector<TVMFFIAny> values;
  values.reserve(site.arguments.size());
  auto list = site.lists.begin();
  for (const Argument& argument : site.arguments) {
    const auto& value = argument.value;
    if (const auto* operand = std::get_if<Operand>(&value)) {
      values.push_back(Any(kTVMFFIDLTensorPtr));
      values.back().v_ptr = tensors.Add(OperandAt(args, argument, operand->index), argument.name,
                                        place.device);
    } else if (const auto* result = std::get_if<Result>(&value)) {
      values.push_back(Any(kTVMFFIDLTensorPtr));
      values.back().v_ptr =
          tensors.Add(ResultAt(rets, argument, result->index), argument.name, place.device);
    } else if (const auto* number = std::get_if<int64_t>(&value)) {
      values.push_back(Any(kTVMFFIInt));
      values.back().v_int64 = *number;
    } else if (const auto* real = std::get_if<double>(&value)) {
      values.push_back(Any(kTVMFFIFloat));
      values.back().v_float64 = *real;
    } else if (const auto* truth = std::get_if<bool>(&value)) {
      values.push_back(Any(kTVMFFIBool));
      values.back().v_int64 = *truth;
    } else if (std::holds_alternative<IntList>(value)) {
      values.push_back(Any((*list)->type_index));
      values.back().v_obj = *list++;
    } else {
      values.push_back(Any(kTVMFFINone));
    }
  }
  DLTensor* memory = tensors.Add(workspace, "workspace", place.device);

  const TvmFfi& tvm_ffi = site.home->tvm_ffi();
  Arena arena(memory->data, workspace.size_bytes(), place.device);
  Environment environment(tvm_ffi, place.device, place.stream, &Arena::Allocate);
  Module::Current current(*site.home);
  TVMFFIAny returned{};
  if (site.callee(nullptr, values.data(), static_cast<int32_t>(values.size()), &returned) != 0) {
    throw tvm_ffi.Raised();
  }
  // Results come back in the caller's own buffers; what is returned may hold parts of the workspace.
  if (returned.type_index >= kTVMFFIStaticObjectBegin) tvm_ffi.object_dec_ref(returned.v_obj);
  if (arena.live() != 0) {
    throw Failure(ErrorCode::kInternal, "it kept " + std::to_string(arena.live()) +
                                            " tensors of the workspace after it returned");
  }
}

// The current device, while it lives, of the runtime that a module uses.
class CurrentDevice {
 public:
  CurrentDevice(const Cuda& cuda, int ordinal) : cuda_(cuda) {
    if (cuda.set_device == nullptr || cuda.get_device == nullptr) return;
    cuda.get_device(&previous_);
    if (previous_ == ordinal) return;
    if (const int status = cuda.set_device(ordinal)) {
      throw Failure(ErrorCode::kInternal, "cudaSetDevice(" + std::to_string(ordinal) +
                                              "): " + cuda.get_error_string(status));
    }
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cuda_.set_device(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  const Cuda& cuda_;
  int previous_ = 0;
  bool changed_ = false;
};

// A stream whose work is recorded and thrown away.
class Discarded {
 public:
  explicit Discarded(const Cuda& cuda) : cuda_(cuda) {
    // cudaStreamNonBlocking; cudaStreamCaptureModeRelaxed, in which kernels may be loaded.
    Check(cuda.stream_create_with_flags(&stream_, 1), "cudaStreamCreateWithFlags");
    if (const int status = cuda.stream_begin_capture(stream_, 2)) {
      cuda.stream_destroy(stream_);
      Check(status, "cudaStreamBeginCapture");
    }
  }
  ~Discarded() {
    void* graph = nullptr;
    if (cuda_.stream_end_capture(stream_, &graph) == 0 && graph != nullptr) {
      cuda_.graph_destroy(graph);
    }
    cuda_.stream_destroy(stream_);
  }
  Discarded(const Discarded&) = delete;
  Discarded& operator=(const Discarded&) = delete;

  void* stream() const { return stream_; }

 private:
  void Check(int status, const char* what) const {
    if (status == 0) return;
    throw Failure(ErrorCode::kInternal, std::string(what) + ": " + cuda_.get_error_string(status));
  }

  const Cuda& cuda_;
  void* stream_ = nullptr;
};

// Loads whatever the call will launch, by making it once on a stream whose work is thrown away: XLA may
// record the real one into a graph, and nothing can be loaded then.
void Warm(CallSite& site, Place place, const ffi::RemainingArgs& args,
          const ffi::RemainingRets& rets) {
  std::lock_guard once(site.warm_mutex);
  if (site.warm.count(place.device.device_id) != 0) return;
  const Cuda& cuda = site.home->cuda();
  if (cuda.stream_begin_capture != nullptr) {
    std::unique_lock lock(site.home->kernels());
    Discarded discarded(cuda);
    Invoke(site, {place.device, discarded.stream()}, args, rets);
  }
  site.warm.insert(place.device.device_id);
}

// Runs `body`, with what it throws as XLA's error.
template <typename Body>
ffi::Error Guarded(const CallSite& site, Body&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const Failure& failure) {
    return ffi::Error(failure.code(), site.function + ": " + failure.what());
  } catch (const std::exception& error) {
    return ffi::Error(ErrorCode::kInternal, site.function + ": " + error.what());
  }
}

template <typename T>
T Attribute(const ffi::Dictionary& attributes, const char* name) {
  const auto value = attributes.get<T>(name);
  if (value.has_error()) {
    throw Failure(ErrorCode::kInvalidArgument,
                  std::string("attribute ") + name + ": " + value.error().message());
  }
  return *value;
}

template <typename Site>
ffi::ErrorOr<std::unique_ptr<Site>> Instantiate(ffi::Dictionary attributes) {
  auto site = std::make_unique<Site>();
  const ffi::Error error = Guarded(*site, [&] {
    site->function = Attribute<std::string_view>(attributes, "function");
    site->module = Attribute<std::string_view>(attributes, "module");
    site->arguments = ReadProgram(Attribute<ffi::Span<const int64_t>>(attributes, "program"),
                                  Attribute<std::string_view>(attributes, "arguments"));
    // One of a later version would change what the call means.
    if (attributes.size() != 4) {
      throw Failure(ErrorCode::kInvalidArgument,
                    "there are " + std::to_string(attributes.size()) +
                        " attributes, and this version of libjax_nvfp4_moe knows module, function, "
                        "program and arguments");
    }
  });
  if (error.failure()) return ffi::Unexpected(error);
  return site;
}

ffi::Error Initialize(CallSite* site, int32_t ordinal, void* stream, ffi::RemainingArgs args,
                      ffi::RemainingRets rets) {
  return Guarded(*site, [&] {
    site->Resolve();
    CurrentDevice device(site->home->cuda(), ordinal);
    Warm(*site, {{kDLCUDA, ordinal}, stream}, args, rets);
  });
}

ffi::Error Execute(CallSite* site, int32_t ordinal, void* stream, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  return Guarded(*site, [&] {
    site->Resolve();
    CurrentDevice device(site->home->cuda(), ordinal);
    std::shared_lock lock(site->home->kernels());
    Invoke(*site, {{kDLCUDA, ordinal}, stream}, args, rets);
  });
}

// On the CPU XLA has no stage in which to load; the first call does.
ffi::Error ExecuteOnHost(HostCallSite* site, int32_t ordinal, ffi::RemainingArgs args,
                         ffi::RemainingRets rets) {
  return Guarded(*site, [&] {
    site->Resolve();
    const auto type = static_cast<DLDeviceType>(host.device_type.load());
    const Place place = {{type, type == kDLCPU ? 0 : ordinal}, host.stream.load()};
    CurrentDevice device(site->home->cuda(), ordinal);
    if (type != kDLCPU) Warm(*site, place, args, rets);
    std::shared_lock lock(site->home->kernels());
    Invoke(*site, place, args, rets);
  });
}

}  // namespace

// ------------------------------------------------------------------------------ what Python opens

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED ffi::TypeId* jax_nvfp4_moe_call_site_id() { return &CallSite::id; }

EXPORTED ffi::TypeInfo* jax_nvfp4_moe_call_site_info() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<CallSite>();
  return &info;
}

EXPORTED ffi::TypeId* jax_nvfp4_moe_call_site_id_on_host() { return &HostCallSite::id; }

EXPORTED ffi::TypeInfo* jax_nvfp4_moe_call_site_info_on_host() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<HostCallSite>();
  return &info;
}

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_instantiate(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::BindInstantiate().Attrs().To(Instantiate<CallSite>).release();
  return handler->Call(frame);
}

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_instantiate_on_host(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::BindInstantiate().Attrs().To(Instantiate<HostCallSite>).release();
  return handler->Call(frame);
}

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_initialize(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                             .Ctx<ffi::State<CallSite>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::PlatformStream<void*>>()
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

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_execute_on_host(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::State<HostCallSite>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .To(ExecuteOnHost)
                             .release();
  return handler->Call(frame);
}

// Registers a module; returns null, or why not, valid until this thread's next call.
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

// For tests: see Host.
EXPORTED void jax_nvfp4_moe_present_host_as(int device_type, void* stream,
                                            void* (*address)(const char*, void*, size_t)) {
  host.device_type = device_type;
  host.stream = stream;
  host.address = address;
}

}  // namespace jax_nvfp4_moe
