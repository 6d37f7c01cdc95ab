// One call of the layer on the CPU: its arguments, and what its stages pass to each other.
//
// Plain data only. Files compiled for other instruction sets include this; an inline function here
// could be linked into the rest of the library with their instructions.

#ifndef JAX_NVFP4_MOE_CPU_LAYER_H_
#define JAX_NVFP4_MOE_CPU_LAYER_H_

#include <cstddef>
#include <cstdint>

namespace jax_nvfp4_moe::cpu {

constexpr int64_t kBlock = 16;  // elements that share a scale

enum class Scheme : int64_t { kStatic, kPerToken, kNone };
enum class Activation : int64_t { kSilu, kGelu, kGeluTanh, kSwigluOai, kRelu2 };
enum class Rounding : int64_t { kFloat32, kBfloat16, kFloat16 };

// An array of float32, or of bfloat16.
struct Elements {
  void* data;
  bool bf16;
};

// Weights of all experts, [E, rows, columns], rows in any order.
struct Matrix {
  const uint8_t* codes;   // [E, stored_rows, code_stride]: two E2M1 codes a byte, the even one low
  const uint8_t* scales;  // [E, stored_rows, scale_stride]: E4M3
  const int32_t* order;   // where each logical row is stored; null: where it belongs
  int64_t rows;
  int64_t columns;
  int64_t stored_rows;   // padded
  int64_t code_stride;   // bytes of a stored row
  int64_t scale_stride;  // likewise
  bool swizzled;         // scales lie in tiles of 128 x 4 (jax_nvfp4_moe/layouts.py)
};

// Added to twice the values of weights: instructions multiply unsigned bytes by signed ones.
constexpr int kShift = 12;

// A block of a quantised activation, as the products read it.
struct E2m1Block {
  // Twice the E2M1 values, of elements 0 2 4 6, 1 3 5 7, 8 10 12 14 and 9 11 13 15.
  int8_t doubled[kBlock];
  // -kShift times their sum, which undoes the shift of the weights in a product.
  int32_t correction;
  // The block's scale times 64: a quarter, because both factors are doubled, times 2**8, which
  // decoded weight scales lack.
  float scale;
};

// A block of an activation that is not quantised, in float32.
struct Fp32Block {
  float value[kBlock];
};

// A block of an activation that is not quantised, in bfloat16.
struct Bf16Block {
  uint16_t value[kBlock];
};

enum class Form { kE2m1, kFp32, kBf16 };

// Pairs of one expert that a task takes together: `tokens` of them from `Layer::pairs[first]` on.
struct Unit {
  int32_t expert;
  int32_t tokens;
  int64_t first;
};

struct Layer {
  int64_t tokens, top_k, num_experts, hidden_size, intermediate_size;
  bool gated;
  Scheme scheme;
  Activation activation;
  float alpha, beta, limit;
  Rounding rounding;  // of an expert's output, and in W4A16 of its hidden activations
  bool weighted;      // the sum over slots applies the routing weights
  bool summed;        // `result` is the sum over slots; else every expert's output

  Elements x;                 // [T, H]
  const int32_t* topk_ids;    // [T, K]; null for `RunCombine`: all are valid
  const float* topk_weights;  // [T, K]
  Matrix w13, w2;
  const float* global_scale13;      // [E, G]
  const float* global_scale2;       // [E]
  const float* bias13;              // [E, G * I] or null
  const float* bias2;               // [E, H] or null
  float w13_input_scale, w2_input_scale;  // decode scales, where static
  Elements result;                  // [T, H], or [T, K, H]

  // Filled in by `Run` and the stages. A pair is a token and one of its slots, number t * K + k.
  const int32_t* pairs;  // [P]: grouped by expert, without the pairs whose expert is not here
  const Unit* units;
  int64_t num_pairs, num_units;
  int64_t hidden_chunk, output_chunk;  // columns of I and of H that one task computes
  Form form;                           // the type of activation blocks that the products take
  void* input;                         // [T, H / 16] blocks
  float* input_global;                 // [T]: decode scales
  void* hidden;                        // [P, I / 16] blocks
  float* hidden_values;                // [P, I]: not quantised yet, for kPerToken
  float* hidden_global;                // [P]
  Elements outputs;                    // [T, K, H]
};

// The stages of a call, compiled for one instruction set. Each function does one task, numbered
// from 0. A task needs all tasks of the stage before.
struct Stages {
  bool bf16;     // multiplies bfloat16 activations as Form::kBf16, not as kFp32
  int64_t rows;  // the most rows of weights that a task multiplies
  void (*input)(const Layer&, int64_t token, void* scratch);
  void (*hidden)(const Layer&, int64_t task, void* scratch);
  void (*requantize)(const Layer&, int64_t pair, void* scratch);  // for kPerToken alone
  void (*output)(const Layer&, int64_t task, void* scratch);
  void (*combine)(const Layer&, int64_t task, void* scratch);
};

constexpr int64_t kFew = 8;             // the most tokens whose sums are in registers at once
constexpr int64_t kTaskTokens = 64;     // the most tokens of a Unit
constexpr int64_t kCombineChunk = 512;  // columns of H that a task of `combine` adds
constexpr int64_t kFewRows = 128;       // Stages::rows: sums stay in the first cache
constexpr int64_t kMostRows = 1024;     // Stages::rows: where preparing tokens takes long
constexpr int64_t kScratchBytes = 2 << 20;  // of each thread

}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_LAYER_H_
