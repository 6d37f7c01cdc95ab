// Instruction sets: which of them this machine has, and the stages compiled for each.

#ifndef JAX_NVFP4_MOE_CPU_LEVEL_H_
#define JAX_NVFP4_MOE_CPU_LEVEL_H_

#include <string>

#include "layer.h"

namespace jax_nvfp4_moe::cpu {

struct Level {
  const char* name;
  const Stages* stages;
  bool (*supported)();  // by this machine
};

// The levels that this library was compiled with, the best first; the last entry has no name.
const Level* Levels();

// The best that this machine has; or the one of that name, or null if it is not there.
const Level* Find(const std::string& name);

extern const Stages kPortable;
#if defined(__x86_64__)
extern const Stages kAvx2;
extern const Stages kAvx512;
extern const Stages kAvx512Vnni;
extern const Stages kAvx512Bf16;
extern const Stages kAmx;
#endif

}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_LEVEL_H_
