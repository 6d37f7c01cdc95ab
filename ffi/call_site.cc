#include "call_site.h"

#include <string_view>
#include <utility>
#include <variant>

#include "failure.h"

namespace jax_nvfp4_moe {
namespace {

namespace ffi = xla::ffi;

template <typename T>
T Attribute(const ffi::Dictionary& attributes, const char* name) {
  const auto value = attributes.get<T>(name);
  if (value.has_error()) {
    throw Failure(ErrorCode::kInvalidArgument,
                  std::string("attribute ") + name + ": " + value.error().message());
  }
  return *value;
}

}  // namespace

ffi::TypeId CallSite::id = {};

CallSite::~CallSite() {
  for (TVMFFIObject* list : lists) home->tvm_ffi().object_dec_ref(list);
}

void CallSite::Resolve() {
  std::call_once(resolved_, [this] {
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

ffi::ErrorOr<std::unique_ptr<CallSite>> MakeCallSite(ffi::Dictionary attributes) {
  std::string prefix;
  try {
    auto site = std::make_unique<CallSite>();
    site->function = Attribute<std::string_view>(attributes, "function");
    prefix = site->function + ": ";
    site->module = Attribute<std::string_view>(attributes, "module");
    site->arguments = ReadProgram(Attribute<ffi::Span<const int64_t>>(attributes, "program"),
                                  Attribute<std::string_view>(attributes, "arguments"));
    // An attribute of a later version may change what the call means.
    if (attributes.size() != 4) {
      throw Failure(ErrorCode::kInvalidArgument,
                    "the call has " + std::to_string(attributes.size()) +
                        " attributes; this version of libjax_nvfp4_moe knows 4: module, function, "
                        "program and arguments");
    }
    return site;
  } catch (...) {
    return ffi::Unexpected(CurrentError(prefix));
  }
}

}  // namespace jax_nvfp4_moe
