// A whole call: grouping pairs by expert, memory, and the stages one after another.

#ifndef JAX_NVFP4_MOE_CPU_RUN_H_
#define JAX_NVFP4_MOE_CPU_RUN_H_

#include "layer.h"
#include "level.h"
#include "team.h"

namespace jax_nvfp4_moe::cpu {

// Computes `layer`, whose second half is filled in here.
//
// Args:
//   threads: how many may work, this one included.
//   schedule: as RunStages has it.
//
// Throws std::bad_alloc and std::overflow_error.
void Run(Layer layer, const Stages& stages, int64_t threads, const Schedule& schedule);

// Its last stage alone, from `outputs` in float.
void RunCombine(Layer layer, const Stages& stages, int64_t threads, const Schedule& schedule);

}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_RUN_H_
