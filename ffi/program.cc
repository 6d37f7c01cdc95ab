#include "program.h"

#include <cstring>

#include "failure.h"

namespace jax_nvfp4_moe {
namespace {

// Numbers of jax_nvfp4_moe/bridge/program.py. Serialised exports contain them: add, never change.
enum Opcode : int64_t {
  kNone = 0,
  kOperand = 1,  // index
  kResult = 2,   // index
  kInt = 3,      // value
  kFloat = 4,    // bits of a double
  kBool = 5,     // 0 or 1
  kIntList = 6,  // length, values
};

std::vector<std::string> Split(std::string_view names) {
  std::vector<std::string> found;
  while (!names.empty()) {
    const size_t comma = names.find(',');
    found.emplace_back(names.substr(0, comma));
    if (comma == std::string_view::npos) break;
    names.remove_prefix(comma + 1);
  }
  return found;
}

class Reader {
 public:
  explicit Reader(xla::ffi::Span<const int64_t> words) : words_(words) {}

  bool done() const { return at_ == words_.size(); }

  int64_t Next() {
    if (done()) throw Failure(ErrorCode::kInvalidArgument, "program: it ends within an argument");
    return words_[at_++];
  }

  size_t Index() {
    const int64_t index = Next();
    if (index < 0) {
      throw Failure(ErrorCode::kInvalidArgument,
                    "program: " + std::to_string(index) + " is no index or length");
    }
    return static_cast<size_t>(index);
  }

 private:
  xla::ffi::Span<const int64_t> words_;
  size_t at_ = 0;
};

Argument ReadArgument(Reader& reader, std::string name) {
  switch (const int64_t opcode = reader.Next()) {
    case kNone:
      return {std::move(name), std::monostate{}};
    case kOperand:
      return {std::move(name), Operand{reader.Index()}};
    case kResult:
      return {std::move(name), Result{reader.Index()}};
    case kInt:
      return {std::move(name), reader.Next()};
    case kFloat: {
      const int64_t bits = reader.Next();
      double value;
      std::memcpy(&value, &bits, sizeof(value));
      return {std::move(name), value};
    }
    case kBool:
      return {std::move(name), reader.Next() != 0};
    case kIntList: {
      IntList values;
      for (size_t left = reader.Index(); left > 0; --left) values.push_back(reader.Next());
      return {std::move(name), std::move(values)};
    }
    default:
      throw Failure(ErrorCode::kInvalidArgument,
                    "program: argument " + name + " has the opcode " + std::to_string(opcode) +
                        ", which this version of libjax_nvfp4_moe does not know");
  }
}

}  // namespace

std::vector<Argument> ReadProgram(xla::ffi::Span<const int64_t> words, std::string_view names) {
  Reader reader(words);
  std::vector<Argument> arguments;
  for (std::string& name : Split(names)) {
    if (reader.done()) {
      throw Failure(ErrorCode::kInvalidArgument, "program: there is nothing for argument " + name);
    }
    arguments.push_back(ReadArgument(reader, std::move(name)));
  }
  if (!reader.done()) {
    throw Failure(ErrorCode::kInvalidArgument, "program: there is more than its " +
                                                   std::to_string(arguments.size()) +
                                                   " names account for");
  }
  return arguments;
}

}  // namespace jax_nvfp4_moe
