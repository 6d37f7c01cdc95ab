// The XLA FFI handlers of the CPU implementation.
//
// The layer. Operands: x f32 or bf16 [T, H]; topk_ids s32 [T, K]; topk_weights f32 [T, K]; for w13
// and for w2 codes u8 [E, rows, bytes], scales f8e4m3fn [E, rows, bytes], order s32 [logical rows]
// or [0], global scales f32 [E, G] and [E], bias f32 [E, logical rows] or [0]; w13_input_scale and
// w2_input_scale f32 [], of the static scheme. Result: f32 or bf16 [T, H], or f32 [T, K, H] for every
// expert's output.
//
// Attributes: those of `jax_nvfp4_moe.implementations.cpu.implementation`.
//
// The sum over slots alone, for experts that are on several devices. Operands: rows f32 [T, K, H];
// topk_weights f32 [T, K]. Result: f32 or bf16 [T, H]. Attributes: level, weighted.

#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include "../failure.h"
#include "../sizes.h"
#include "level.h"
#include "operands.h"
#include "run.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe::cpu {
namespace {

namespace ffi = xla::ffi;

constexpr char kPrefix[] = "jax_nvfp4_moe on the CPU: ";

const Stages& StagesOf(std::string_view name) {
  const Level* const level = Find(std::string(name));
  if (level == nullptr || !level->supported()) {
    std::string here;
    for (const Level* each = Levels(); each->name != nullptr; ++each) {
      if (each->supported()) here += (here.empty() ? "" : ", ") + std::string(each->name);
    }
    throw Failure(ErrorCode::kUnimplemented, "level is '" + std::string(name) +
                                                 "'; this library has, on this machine, " + here);
  }
  return *level->stages;
}

// Pairs of a token and a slot. The kernels number them with 32 bits.
int64_t Pairs(int64_t tokens, int64_t top_k) {
  const int64_t pairs = Product(tokens, top_k);
  if (pairs > std::numeric_limits<int32_t>::max()) {
    Refuse("T * K is " + std::to_string(tokens) + " * " + std::to_string(top_k) +
           "; expected at most 2**31 - 1");
  }
  return pairs;
}

Schedule On(ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
}

ffi::Error Compute(ffi::ThreadPool pool, AnyBuffer x, IntBuffer topk_ids, FloatBuffer topk_weights,
                   ByteBuffer codes13, AnyBuffer scales13, IntBuffer order13, FloatBuffer global13,
                   FloatBuffer bias13, ByteBuffer codes2, AnyBuffer scales2, IntBuffer order2,
                   FloatBuffer global2, FloatBuffer bias2, FloatBuffer w13_input_scale,
                   FloatBuffer w2_input_scale, ffi::Result<AnyBuffer> result, std::string_view level,
                   std::string_view scheme, std::string_view activation, float alpha, float beta,
                   float limit, std::string_view rounding, bool weighted, int64_t intermediate_size,
                   bool swizzled) try {
  ExpectRank("x", x.dimensions(), 2, "[T, H]");
  ExpectRank("topk_ids", topk_ids.dimensions(), 2, "[T, K]");
  ExpectRank("w13's codes", codes13.dimensions(), 3, "[E, rows, bytes]");
  Layer layer = {};
  layer.tokens = x.dimensions()[0];
  layer.hidden_size = x.dimensions()[1];
  layer.top_k = topk_ids.dimensions()[1];
  layer.num_experts = codes13.dimensions()[0];
  layer.intermediate_size = intermediate_size;
  ExpectBlocks("the hidden size", layer.hidden_size);
  ExpectBlocks("intermediate_size", layer.intermediate_size);
  Pairs(layer.tokens, layer.top_k);
  layer.scheme = Parse<Scheme>("scheme", scheme, {"static", "per_token", "none"});
  layer.activation = Parse<Activation>("activation", activation,
                                       {"silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2"});
  layer.rounding = Parse<Rounding>("rounding", rounding, {"float32", "bfloat16", "float16"});
  layer.gated = layer.activation != Activation::kRelu2;
  layer.alpha = alpha;
  layer.beta = beta;
  layer.limit = limit;
  layer.weighted = weighted;
  layer.summed = result->dimensions().size() == 2;

  const int64_t tokens = layer.tokens, top_k = layer.top_k, experts = layer.num_experts;
  const int64_t hidden = layer.hidden_size, groups = layer.gated ? 2 : 1;
  const int64_t rows13 = Product(groups, intermediate_size);
  ExpectShape("topk_ids", topk_ids.dimensions(), {tokens, top_k}, "[T, K]");
  ExpectShape("topk_weights", topk_weights.dimensions(), {tokens, top_k}, "[T, K]");
  ExpectShape("w13's global scales", global13.dimensions(), {experts, groups}, "[E, G]");
  ExpectShape("w2's global scales", global2.dimensions(), {experts}, "[E]");
  if (layer.summed) {
    ExpectShape("the result", result->dimensions(), {tokens, hidden}, "[T, H]");
  } else {
    ExpectShape("the result", result->dimensions(), {tokens, top_k, hidden}, "[T, K, H]");
  }
  layer.x = ElementsOf("x", x);
  layer.topk_ids = topk_ids.typed_data();
  layer.topk_weights = topk_weights.typed_data();
  layer.w13 = MatrixOf("w13", codes13, scales13, order13, experts, rows13, hidden, swizzled);
  layer.w2 = MatrixOf("w2", codes2, scales2, order2, experts, hidden, intermediate_size, swizzled);
  layer.global_scale13 = global13.typed_data();
  layer.global_scale2 = global2.typed_data();
  layer.bias13 = OptionalArray("w13's bias", bias13, {experts, rows13}, "[E, G * I]");
  layer.bias2 = OptionalArray("w2's bias", bias2, {experts, hidden}, "[E, H]");
  layer.w13_input_scale = Scalar("w13_input_scale", w13_input_scale);
  layer.w2_input_scale = Scalar("w2_input_scale", w2_input_scale);
  layer.result = ElementsOf("the result", *result);
  if (!layer.summed && layer.result.bf16) {
    Refuse("the result, every expert's output, is bfloat16; expected float32");
  }

  Run(layer, StagesOf(level), pool.num_threads(), On(pool));
  return ffi::Error::Success();
} catch (...) {
  return CurrentError(kPrefix);
}

ffi::Error Combine(ffi::ThreadPool pool, FloatBuffer rows, FloatBuffer topk_weights,
                   ffi::Result<AnyBuffer> result, std::string_view level, bool weighted) try {
  ExpectRank("rows", rows.dimensions(), 3, "[T, K, H]");
  Layer layer = {};
  layer.tokens = rows.dimensions()[0];
  layer.top_k = rows.dimensions()[1];
  layer.hidden_size = rows.dimensions()[2];
  ExpectBlocks("the hidden size", layer.hidden_size);
  Pairs(layer.tokens, layer.top_k);
  ExpectShape("topk_weights", topk_weights.dimensions(), {layer.tokens, layer.top_k}, "[T, K]");
  ExpectShape("the result", result->dimensions(), {layer.tokens, layer.hidden_size}, "[T, H]");
  layer.weighted = weighted;
  layer.topk_weights = topk_weights.typed_data();
  layer.outputs = {rows.typed_data(), false};
  layer.result = ElementsOf("the result", *result);
  RunCombine(layer, StagesOf(level), pool.num_threads(), On(pool));
  return ffi::Error::Success();
} catch (...) {
  return CurrentError(kPrefix);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_layer_on_cpu(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<AnyBuffer>()    // x
                             .Arg<IntBuffer>()    // topk_ids
                             .Arg<FloatBuffer>()  // topk_weights
                             .Arg<ByteBuffer>()   // w13
                             .Arg<AnyBuffer>()
                             .Arg<IntBuffer>()
                             .Arg<FloatBuffer>()
                             .Arg<FloatBuffer>()
                             .Arg<ByteBuffer>()  // w2
                             .Arg<AnyBuffer>()
                             .Arg<IntBuffer>()
                             .Arg<FloatBuffer>()
                             .Arg<FloatBuffer>()
                             .Arg<FloatBuffer>()  // w13_input_scale
                             .Arg<FloatBuffer>()  // w2_input_scale
                             .Ret<AnyBuffer>()
                             .Attr<std::string_view>("level")
                             .Attr<std::string_view>("scheme")
                             .Attr<std::string_view>("activation")
                             .Attr<float>("alpha")
                             .Attr<float>("beta")
                             .Attr<float>("limit")
                             .Attr<std::string_view>("rounding")
                             .Attr<bool>("weighted")
                             .Attr<int64_t>("intermediate_size")
                             .Attr<bool>("swizzled")
                             .To(Compute)
                             .release();
  return handler->Call(frame);
}

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_combine_on_cpu(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<FloatBuffer>()  // rows
                             .Arg<FloatBuffer>()  // topk_weights
                             .Ret<AnyBuffer>()
                             .Attr<std::string_view>("level")
                             .Attr<bool>("weighted")
                             .To(Combine)
                             .release();
  return handler->Call(frame);
}

// The name of level number `index`, the best first, or null beyond the last. `*supported` is set to
// whether this machine has its instructions.
EXPORTED const char* jax_nvfp4_moe_cpu_level(int index, bool* supported) {
  for (const Level* level = Levels(); level->name != nullptr; ++level) {
    if (index-- == 0) {
      *supported = level->supported();
      return level->name;
    }
  }
  return nullptr;
}

}  // namespace jax_nvfp4_moe::cpu
