// One call of the layer on the CPU: what it is given, and what its stages hand to each other.
//
// Plain data only: files that are compiled for other instruction sets include this, and must not
// leave inline functions of theirs for the rest of the library to be linked with.

#ifndef JAX_NVFP4_MOE_CPU_LAYER_H_
#define JAX_NVFP4_MOE_CPU_LAYER_H_

#include <cstddef>
#include <cstdint>

namespace jax_nvfp4_moe::cpu {

constexpr int64_t kBlock = 16;  // elements that share a scale

enum class Scheme : int64_t { kStatic, kPerToken, kNone };
enum class Curve : int64_t { kSilu, kGelu, kGeluTanh, kSwigluOai, kRelu2 };
enum class Rounding : int64_t { kFloat32, kBfloat16, kFloat16 };

// Floats of an array in memory: float, or, if `narrow`, the upper half of each, a bfloat16.
struct Elements {
  void* data;
  bool narrow;
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

// Added to twice the values of weights, as instructions multiply unsigned bytes by signed ones.
constexpr int kShift = 12;

// One block of a quantised activation, as the products read it.
struct Codes {
  // Twice the E2M1 values, of elements 0 2 4 6, 1 3 5 7, 8 10 12 14 and 9 11 13 15.
  int8_t doubled[kBlock];
  // -kShift times their sum: what is to be added as the weights that they meet are shifted.
  int32_t correction;
  // The block's, times 64: a quarter, as both factors are doubled, and 2**8, which decoded weight
  // scales lack.
  float scale;
};

// One block of an activation that is not quantised.
struct Values {
  float value[kBlock];
};

// One block of either, where bfloat16 holds it exactly.
struct Narrow {
  uint16_t value[kBlock];
};

enum class Form { kCodes, kValues, kNarrow };

// Some of one expert's pairs, in the order of `Layer::pairs`.
struct Unit {
  int32_t expert;
  int32_t tokens;
  int64_t first;
};

struct Layer {
  int64_t tokens, top_k, num_experts, hidden_size, intermediate_size;
  bool gated;
  Scheme scheme;
  Curve curve;
  float alpha, beta, limit;
  Rounding rounding;  // of what lies between the stages in W4A16, and of an expert's output
  bool weighted;      // whether the sum over slots applies the routing weights
  bool summed;        // whether `result` is that sum, or every expert's output

  Elements x;                 // [T, H]
  const int32_t* topk_ids;    // [T, K]; null for `combine`: all are valid
  const float* topk_weights;  // [T, K]
  Matrix w13, w2;
  const float* global_scale13;      // [E, G]
  const float* global_scale2;       // [E]
  const float* bias13;              // [E, G * I] or null
  const float* bias2;               // [E, H] or null
  float input_scale, hidden_scale;  // decode scales, where static
  Elements result;                  // [T, H], or [T, K, H]

  // Made by the stages. A pair is a token's slot, number t * K + k.
  const int32_t* pairs;  // [P]: grouped by expert; those without one are not there
  const Unit* units;
  int64_t num_pairs, num_units;
  int64_t hidden_chunk, output_chunk;  // columns of I and of H that one task computes
  Form form;                           // of what the products take
  void* input;                         // [T, H / 16] of that form
  float* input_global;                 // [T]: decode scales
  void* hidden;                        // [P, I / 16]
  float* hidden_values;                // [P, I]: before they are quantised, for kPerToken
  float* hidden_global;                // [P]
  Elements outputs;                    // [T, K, H]
};

// The stages of a call, compiled for one instruction set. Each does one task, numbered from 0, and
// needs all tasks of the stage before.
struct Stages {
  bool narrow;   // takes kNarrow where activations are bfloat16, not kValues
  int64_t rows;  // of weights that a task multiplies, at most
  void (*input)(const Layer&, int64_t token, void* scratch);
  void (*hidden)(const Layer&, int64_t task, void* scratch);
  void (*requantize)(const Layer&, int64_t pair, void* scratch);  // for kPerToken alone
  void (*output)(const Layer&, int64_t task, void* scratch);
  void (*combine)(const Layer&, int64_t task, void* scratch);
};

constexpr int64_t kFew = 8;             // tokens whose sums are in registers at once
constexpr int64_t kTaskTokens = 64;     // at most, of a Unit
constexpr int64_t kCombineChunk = 512;  // columns of H that a task of `combine` adds
constexpr int64_t kFewRows = 128;       // Stages::rows, where sums should stay in the first cache
constexpr int64_t kMostRows = 1024;     // and where preparing tokens takes long
constexpr int64_t kScratchBytes = 2 << 20;  // of each thread

}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_LAYER_H_
