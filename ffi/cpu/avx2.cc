// The level for AVX2, FMA and F16C.

#include "engine_x86.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {

const Stages kAvx2 = StagesOf<E2m1Engine<Vector256>, Fp32Engine<Vector256>>();

}  // namespace jax_nvfp4_moe::cpu
