#include "call_arguments.h"

#include <string>
#include <variant>

#include "failure.h"

namespace jax_nvfp4_moe {
namespace {

namespace ffi = xla::ffi;

ffi::AnyBuffer OperandAt(const ffi::RemainingArgs& args, const Argument& argument, size_t index) {
  const auto buffer = args.get<ffi::AnyBuffer>(index);
  if (buffer.has_error()) {
    throw Failure(ErrorCode::kInvalidArgument,
                  argument.name + " is operand " + std::to_string(index) +
                      " of the call, which has " + std::to_string(args.size()));
  }
  return *buffer;
}

ffi::AnyBuffer ResultAt(const ffi::RemainingRets& rets, const Argument& argument, size_t index) {
  const size_t written = rets.size() - 1;  // without the workspace
  if (index >= written) {
    throw Failure(ErrorCode::kInvalidArgument,
                  argument.name + " is result " + std::to_string(index) +
                      " of the call, which has " + std::to_string(written) +
                      " beside the workspace");
  }
  return **rets.get<ffi::AnyBuffer>(index);
}

ffi::AnyBuffer WorkspaceOf(const ffi::RemainingRets& rets) {
  if (rets.size() == 0) {
    throw Failure(ErrorCode::kInvalidArgument,
                  "the call has no results; the last one has to be the workspace");
  }
  return **rets.get<ffi::AnyBuffer>(rets.size() - 1);
}

// Of all tensors of a call together.
size_t Dimensions(const CallSite& site, const ffi::RemainingArgs& args,
                  const ffi::RemainingRets& rets) {
  size_t dimensions = WorkspaceOf(rets).dimensions().size();
  for (const Argument& argument : site.arguments) {
    if (const auto* operand = std::get_if<Operand>(&argument.value)) {
      dimensions += OperandAt(args, argument, operand->index).dimensions().size();
    } else if (const auto* result = std::get_if<Result>(&argument.value)) {
      dimensions += ResultAt(rets, argument, result->index).dimensions().size();
    }
  }
  return dimensions;
}

TVMFFIAny Any(int32_t type_index) {
  TVMFFIAny any{};
  any.type_index = type_index;
  return any;
}

}  // namespace

CallArguments::CallArguments(const CallSite& site, DLDevice device, const ffi::RemainingArgs& args,
                             const ffi::RemainingRets& rets)
    : tensors_(site.arguments.size() + 1, Dimensions(site, args, rets)) {
  values_.reserve(site.arguments.size());
  auto list = site.lists.begin();
  for (const Argument& argument : site.arguments) {
    const auto& value = argument.value;
    if (const auto* operand = std::get_if<Operand>(&value)) {
      values_.push_back(Any(kTVMFFIDLTensorPtr));
      values_.back().v_ptr =
          tensors_.Add(OperandAt(args, argument, operand->index), argument.name, device);
    } else if (const auto* result = std::get_if<Result>(&value)) {
      values_.push_back(Any(kTVMFFIDLTensorPtr));
      values_.back().v_ptr =
          tensors_.Add(ResultAt(rets, argument, result->index), argument.name, device);
    } else if (const auto* number = std::get_if<int64_t>(&value)) {
      values_.push_back(Any(kTVMFFIInt));
      values_.back().v_int64 = *number;
    } else if (const auto* real = std::get_if<double>(&value)) {
      values_.push_back(Any(kTVMFFIFloat));
      values_.back().v_float64 = *real;
    } else if (const auto* truth = std::get_if<bool>(&value)) {
      values_.push_back(Any(kTVMFFIBool));
      values_.back().v_int64 = *truth;
    } else if (std::holds_alternative<IntList>(value)) {
      values_.push_back(Any((*list)->type_index));
      values_.back().v_obj = *list++;
    } else {
      values_.push_back(Any(kTVMFFINone));
    }
  }
  const ffi::AnyBuffer workspace = WorkspaceOf(rets);
  workspace_ = tensors_.Add(workspace, "workspace", device);
  workspace_bytes_ = workspace.size_bytes();
}

}  // namespace jax_nvfp4_moe
