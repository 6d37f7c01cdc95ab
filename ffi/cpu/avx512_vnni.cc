// The level for AVX-512 with VNNI.

#include "engine_x86.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {

const Stages kAvx512Vnni = StagesOf<E2m1Engine<Vector512>, Fp32Engine<Vector512>>();

}  // namespace jax_nvfp4_moe::cpu
