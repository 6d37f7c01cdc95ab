// What a callee is called with: a list that stands in the call's attributes.
//
// FlashInfer's functions take several dozen positional arguments, many of them None, in an order that
// its versions change. The list is written in Python (jax_nvfp4_moe/bridge/program.py), so that this
// library knows no signature.

#ifndef JAX_NVFP4_MOE_PROGRAM_H_
#define JAX_NVFP4_MOE_PROGRAM_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe {

struct Operand {
  size_t index;  // among XLA's operands
};
struct Result {
  size_t index;  // among its results, without the workspace
};
using IntList = std::vector<int64_t>;  // an empty one serves for any empty Array

// One argument; std::monostate is None.
struct Argument {
  std::string name;
  std::variant<std::monostate, Operand, Result, int64_t, double, bool, IntList> value;
};

// Reads words [opcode, payload...]... and as many names, separated by commas.
//
// Throws Failure: a word is unknown or missing, or there are not as many names.
std::vector<Argument> ReadProgram(xla::ffi::Span<const int64_t> words, std::string_view names);

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_PROGRAM_H_
