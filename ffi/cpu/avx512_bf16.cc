// The level for AVX-512 with VNNI and BF16.

#include "engine_avx512.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {

const Stages kAvx512Bf16 = StagesOf<Avx512Codes, Avx512Values, Avx512Narrow>();

}  // namespace jax_nvfp4_moe::cpu
