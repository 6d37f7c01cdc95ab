// Runs recorded calls of the CPU kernels at one level, without XLA: on an emulator, or on another
// machine. `tests/cpu/replay.py` records the calls and checks what this prints.
//
//     replay LEVEL FILE...
//
// For each file a line: its name and its result, float32 in hexadecimal. Every call is run by one
// thread and then by four, which have to agree.

#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "level.h"
#include "run.h"

namespace jax_nvfp4_moe::cpu {
namespace {

struct Array {
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  template <class T>
  const T* data() const {
    return reinterpret_cast<const T*>(bytes.data());
  }
  const float* OrNull() const { return bytes.empty() ? nullptr : data<float>(); }
};

struct Recorded {
  std::map<std::string, std::string> attributes;
  std::vector<Array> operands;  // in the order of ffi/cpu/handler.cc
};

// A line for each attribute, a line and then the bytes of each operand.
Recorded Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  Recorded recorded;
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string kind, name;
    words >> kind;
    if (kind == "attribute") {
      words >> name >> recorded.attributes[name];
      continue;
    }
    Array array;
    int64_t bytes = 0, axis = 0;
    words >> bytes;
    while (words >> axis) array.shape.push_back(axis);
    array.bytes.resize(bytes);
    file.read(array.bytes.data(), bytes);
    recorded.operands.push_back(std::move(array));
  }
  if (recorded.operands.size() != 15) throw std::runtime_error(path + " has not all operands");
  return recorded;
}

int64_t Index(const std::string& name, const std::vector<std::string>& names) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return i;
  }
  throw std::runtime_error("unknown: " + name);
}

Matrix MatrixOf(const Array* operands, int64_t rows, int64_t columns, bool swizzled) {
  const std::vector<int64_t>& shape = operands[0].shape;
  Matrix matrix = {};
  matrix.codes = operands[0].data<uint8_t>();
  matrix.scales = operands[1].data<uint8_t>();
  matrix.order = operands[2].bytes.empty() ? nullptr : operands[2].data<int32_t>();
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.stored_rows = shape[1];
  matrix.code_stride = shape[2];
  matrix.scale_stride = operands[1].shape[2];
  matrix.swizzled = swizzled;
  return matrix;
}

Layer LayerOf(const Recorded& recorded) {
  const auto& text = recorded.attributes;
  const Array* const operands = recorded.operands.data();
  Layer layer = {};
  layer.tokens = operands[0].shape[0];
  layer.hidden_size = operands[0].shape[1];
  layer.top_k = operands[1].shape[1];
  layer.num_experts = operands[3].shape[0];
  layer.intermediate_size = std::stoll(text.at("intermediate_size"));
  layer.scheme = static_cast<Scheme>(Index(text.at("scheme"), {"static", "per_token", "none"}));
  layer.activation = static_cast<Activation>(
      Index(text.at("activation"), {"silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2"}));
  layer.rounding =
      static_cast<Rounding>(Index(text.at("rounding"), {"float32", "bfloat16", "float16"}));
  layer.gated = layer.activation != Activation::kRelu2;
  layer.alpha = std::stof(text.at("alpha"));
  layer.beta = std::stof(text.at("beta"));
  layer.limit = std::stof(text.at("limit"));
  layer.weighted = text.at("weighted") == "True";
  layer.summed = true;
  const bool swizzled = text.at("swizzled") == "True";
  layer.x = {const_cast<float*>(operands[0].data<float>()), false};
  layer.topk_ids = operands[1].data<int32_t>();
  layer.topk_weights = operands[2].data<float>();
  layer.w13 = MatrixOf(operands + 3, (layer.gated ? 2 : 1) * layer.intermediate_size,
                       layer.hidden_size, swizzled);
  layer.global_scale13 = operands[6].data<float>();
  layer.bias13 = operands[7].OrNull();
  layer.w2 = MatrixOf(operands + 8, layer.hidden_size, layer.intermediate_size, swizzled);
  layer.global_scale2 = operands[11].data<float>();
  layer.bias2 = operands[12].OrNull();
  layer.w13_input_scale = operands[13].data<float>()[0];
  layer.w2_input_scale = operands[14].data<float>()[0];
  return layer;
}

std::vector<float> RunWith(int64_t threads, Layer layer, const Stages& stages) {
  std::vector<float> result(layer.tokens * layer.hidden_size, -1.0f);
  layer.result = {result.data(), false};
  std::vector<std::thread> helpers;
  Run(layer, stages, threads, [&](std::function<void()> task) { helpers.emplace_back(task); });
  for (std::thread& helper : helpers) helper.join();
  return result;
}

int Main(int argc, char** argv) {
  const Level* const level = Find(argv[1]);
  if (level == nullptr || !level->supported()) {
    std::fprintf(stderr, "this machine lacks %s\n", argv[1]);
    return 3;
  }
  std::fprintf(stderr, "best here: %s\n", Find("")->name);
  for (int i = 2; i < argc; ++i) {
    const Recorded recorded = Read(argv[i]);
    const Layer layer = LayerOf(recorded);
    const std::vector<float> result = RunWith(1, layer, *level->stages);
    const std::vector<float> again = RunWith(4, layer, *level->stages);
    if (std::memcmp(result.data(), again.data(), result.size() * sizeof(float)) != 0) {
      std::fprintf(stderr, "%s depends on the number of threads\n", argv[i]);
      return 1;
    }
    const std::string path = argv[i];
    std::printf("result %s ", path.substr(path.rfind('/') + 1).c_str());
    for (const float value : result) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      std::printf("%08x", bits);
    }
    std::printf("\n");
  }
  return 0;
}

}  // namespace
}  // namespace jax_nvfp4_moe::cpu

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: replay LEVEL FILE...\n");
    return 2;
  }
  try {
    return jax_nvfp4_moe::cpu::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
