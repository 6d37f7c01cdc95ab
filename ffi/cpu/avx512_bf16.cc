// The level for AVX-512 with VNNI and BF16.

#include "engine_x86.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {

const Stages kAvx512Bf16 = StagesOf<E2m1Engine<Vector512>, Fp32Engine<Vector512>, Bf16Engine>();

}  // namespace jax_nvfp4_moe::cpu
