// The level for AVX-512 with VNNI.

#include "engine_avx512.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {

const Stages kAvx512Vnni = StagesOf<Avx512Codes, Avx512Values>();

}  // namespace jax_nvfp4_moe::cpu
