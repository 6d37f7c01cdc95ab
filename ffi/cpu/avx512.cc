// The level for AVX-512 F, BW, VL and DQ.

#include "engine_x86.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {

const Stages kAvx512 = StagesOf<E2m1Engine<Vector512>, Fp32Engine<Vector512>>();

}  // namespace jax_nvfp4_moe::cpu
