// The XLA FFI handlers of the layer on the CPU.
//
// The layer. Operands: x f32 or bf16 [T, H]; topk_ids s32 [T, K]; topk_weights f32 [T, K]; for w13
// and for w2 codes u8 [E, rows, bytes], scales f8e4m3fn [E, rows, bytes], order s32 [logical rows]
// or [0], global scales f32 [E, G] and [E], bias f32 [E, logical rows] or [0]; input_scale and
// hidden_scale f32 [], of the static scheme. Result: f32 or bf16 [T, H], or f32 [T, K, H] for every
// expert's output.
//
// Attributes: those of `jax_nvfp4_moe.implementations.cpu.implementation`.
//
// The sum over slots alone, for experts that are on several devices. Operands: rows f32 [T, K, H];
// topk_weights f32 [T, K]. Result: f32 or bf16 [T, H]. Attributes: level, weighted.

#include <algorithm>
#include <exception>
#include <functional>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "../failure.h"
#include "level.h"
#include "run.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nvfp4_moe::cpu {
namespace {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Scales = ffi::AnyBuffer;  // of a type that has no C++ type
using Any = ffi::AnyBuffer;     // float32 or bfloat16

[[noreturn]] void Refuse(const std::string& message) {
  throw Failure(ErrorCode::kInvalidArgument, message);
}

void Expect(bool holds, const char* what) {
  if (!holds) Refuse(std::string("jax_nvfp4_moe on the CPU: ") + what);
}

// Which of `names` this is.
template <class Enum, size_t n>
Enum Parse(const char* what, std::string_view name, const std::string_view (&names)[n]) {
  for (size_t i = 0; i < n; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  Refuse(std::string(what) + " is '" + std::string(name) + "', which this version does not know");
}

// Logical sizes beside those of the arrays, which may be padded.
Matrix MatrixOf(const Bytes& codes, const Scales& scales, const Integers& order, int64_t rows,
                int64_t columns, bool swizzled) {
  Expect(codes.dimensions().size() == 3 && scales.dimensions().size() == 3, "weights need 3 axes");
  Expect(scales.element_type() == ffi::DataType::F8E4M3FN, "scales need to be float8_e4m3fn");
  Matrix matrix = {};
  matrix.codes = codes.typed_data();
  matrix.scales = reinterpret_cast<const uint8_t*>(scales.untyped_data());
  matrix.order = order.element_count() == 0 ? nullptr : order.typed_data();
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.stored_rows = codes.dimensions()[1];
  matrix.code_stride = codes.dimensions()[2];
  matrix.scale_stride = scales.dimensions()[2];
  matrix.swizzled = swizzled;
  Expect(scales.dimensions()[0] == codes.dimensions()[0] &&
             scales.dimensions()[1] == matrix.stored_rows && matrix.stored_rows >= rows &&
             matrix.code_stride >= columns / 2 && matrix.scale_stride >= columns / kBlock &&
             rows % kBlock == 0 && columns % kBlock == 0,
         "the sizes of codes and scales do not fit");
  Expect(!swizzled || (matrix.stored_rows % 128 == 0 && matrix.scale_stride % 4 == 0),
         "swizzled scales need whole tiles");
  if (matrix.order != nullptr) {
    Expect(static_cast<int64_t>(order.element_count()) >= rows, "the order lacks rows");
    const auto [least, most] = std::minmax_element(matrix.order, matrix.order + rows);
    Expect(*least >= 0 && *most < matrix.stored_rows, "the order names rows that are not there");
  }
  return matrix;
}

const float* OrNull(const Floats& array, int64_t count, const char* what) {
  Expect(array.element_count() == 0 || static_cast<int64_t>(array.element_count()) == count, what);
  return array.element_count() == 0 ? nullptr : array.typed_data();
}

Elements ElementsOf(const Any& array, const char* what) {
  const bool narrow = array.element_type() == ffi::DataType::BF16;
  Expect(narrow || array.element_type() == ffi::DataType::F32, what);
  return {array.untyped_data(), narrow};
}

const Stages& StagesOf(std::string_view name) {
  const Level* const level = Find(std::string(name));
  if (level == nullptr || !level->supported()) {
    throw Failure(ErrorCode::kUnimplemented,
                  "level '" + std::string(name) + "' is not there, or this machine lacks it");
  }
  return *level->stages;
}

// What was thrown, as XLA has it.
ffi::Error Caught() {
  try {
    throw;
  } catch (const Failure& failure) {
    return ffi::Error(failure.code(), failure.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ErrorCode::kResourceExhausted,
                      "no memory for the layer's intermediate values");
  } catch (const std::exception& error) {
    return ffi::Error(ErrorCode::kInternal, error.what());
  }
}

Schedule On(ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
}

ffi::Error Compute(ffi::ThreadPool pool, Any x, Integers topk_ids, Floats topk_weights,
                   Bytes codes13, Scales scales13, Integers order13, Floats global13, Floats bias13,
                   Bytes codes2, Scales scales2, Integers order2, Floats global2, Floats bias2,
                   Floats input_scale, Floats hidden_scale, ffi::Result<Any> result,
                   std::string_view level, std::string_view scheme, std::string_view activation,
                   float alpha, float beta, float limit, std::string_view rounding, bool weighted,
                   int64_t intermediate_size, bool swizzled) try {
  Expect(x.dimensions().size() == 2 && topk_ids.dimensions().size() == 2 &&
             codes13.dimensions().size() == 3,
         "x and topk_ids need 2 axes, weights 3");
  Layer layer = {};
  layer.tokens = x.dimensions()[0];
  layer.hidden_size = x.dimensions()[1];
  layer.top_k = topk_ids.dimensions()[1];
  layer.num_experts = codes13.dimensions()[0];
  layer.intermediate_size = intermediate_size;
  layer.scheme = Parse<Scheme>("scheme", scheme, {"static", "per_token", "none"});
  layer.curve =
      Parse<Curve>("activation", activation, {"silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2"});
  layer.rounding = Parse<Rounding>("rounding", rounding, {"float32", "bfloat16", "float16"});
  layer.gated = layer.curve != Curve::kRelu2;
  layer.alpha = alpha;
  layer.beta = beta;
  layer.limit = limit;
  layer.weighted = weighted;
  layer.summed = result->dimensions().size() == 2;

  const int64_t groups = layer.gated ? 2 : 1, experts = layer.num_experts;
  const int64_t pairs = layer.tokens * layer.top_k;
  layer.x = ElementsOf(x, "x needs to be float32 or bfloat16");
  layer.topk_ids = topk_ids.typed_data();
  layer.topk_weights = topk_weights.typed_data();
  layer.w13 =
      MatrixOf(codes13, scales13, order13, groups * intermediate_size, layer.hidden_size, swizzled);
  layer.w2 = MatrixOf(codes2, scales2, order2, layer.hidden_size, intermediate_size, swizzled);
  layer.global_scale13 = OrNull(global13, experts * groups, "w13's global scales: expected [E, G]");
  layer.global_scale2 = OrNull(global2, experts, "w2's global scales: expected [E]");
  layer.bias13 = OrNull(bias13, experts * layer.w13.rows, "w13's bias: expected [E, G * I]");
  layer.bias2 = OrNull(bias2, experts * layer.hidden_size, "w2's bias: expected [E, H]");
  layer.input_scale = input_scale.typed_data()[0];
  layer.hidden_scale = hidden_scale.typed_data()[0];
  layer.result = ElementsOf(*result, "the result needs to be float32 or bfloat16");
  Expect(layer.summed || !layer.result.narrow, "every expert's output needs to be float32");
  Expect(static_cast<int64_t>(topk_ids.element_count()) == pairs &&
             static_cast<int64_t>(topk_weights.element_count()) == pairs &&
             codes2.dimensions()[0] == experts && layer.global_scale13 != nullptr &&
             layer.global_scale2 != nullptr &&
             static_cast<int64_t>(result->element_count()) ==
                 (layer.summed ? layer.tokens : pairs) * layer.hidden_size,
         "sizes do not fit");

  Run(layer, StagesOf(level), pool.num_threads(), On(pool));
  return ffi::Error::Success();
} catch (...) {
  return Caught();
}

ffi::Error Combine(ffi::ThreadPool pool, Floats rows, Floats topk_weights, ffi::Result<Any> result,
                   std::string_view level, bool weighted) try {
  Expect(rows.dimensions().size() == 3, "rows need 3 axes");
  Layer layer = {};
  layer.tokens = rows.dimensions()[0];
  layer.top_k = rows.dimensions()[1];
  layer.hidden_size = rows.dimensions()[2];
  layer.weighted = weighted;
  layer.topk_weights = topk_weights.typed_data();
  layer.outputs = {rows.typed_data(), false};
  layer.result = ElementsOf(*result, "the result needs to be float32 or bfloat16");
  Expect(layer.hidden_size % kBlock == 0 &&
             static_cast<int64_t>(topk_weights.element_count()) == layer.tokens * layer.top_k &&
             static_cast<int64_t>(result->element_count()) == layer.tokens * layer.hidden_size,
         "sizes do not fit");
  RunCombine(layer, StagesOf(level), pool.num_threads(), On(pool));
  return ffi::Error::Success();
} catch (...) {
  return Caught();
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED XLA_FFI_Error* jax_nvfp4_moe_layer_on_cpu(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<Any>()       // x
                             .Arg<Integers>()  // topk_ids
                             .Arg<Floats>()    // topk_weights
                             .Arg<Bytes>()     // w13
                             .Arg<Scales>()
                             .Arg<Integers>()
                             .Arg<Floats>()
                             .Arg<Floats>()
                             .Arg<Bytes>()  // w2
                             .Arg<Scales>()
                             .Arg<Integers>()
                             .Arg<Floats>()
                             .Arg<Floats>()
                             .Arg<Floats>()  // input_scale
                             .Arg<Floats>()  // hidden_scale
                             .Ret<Any>()
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
                             .Arg<Floats>()  // rows
                             .Arg<Floats>()  // topk_weights
                             .Ret<Any>()
                             .Attr<std::string_view>("level")
                             .Attr<bool>("weighted")
                             .To(Combine)
                             .release();
  return handler->Call(frame);
}

// The name of level number `index`, the best first, or null; `*supported` says whether this machine
// has it.
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
