// A function's arguments: a list in the call's attributes.
//
// FlashInfer's functions take several dozen positional arguments, many of them None, in an order
// that its versions change. Python writes the list (jax_nvfp4_moe/bridge/program.py), so that this
// library need not know any signature.

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

// Reads the arguments from words [opcode, payload...]... and their names, separated by commas.
//
// Throws Failure: an opcode is unknown, words are missing, or the number of names differs.
std::vector<Argument> ReadProgram(xla::ffi::Span<const int64_t> words, std::string_view names);

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_PROGRAM_H_
