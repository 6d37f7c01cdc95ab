// The level for any machine.

#include "engine_portable.h"
#include "level.h"
#include "stages.h"

namespace jax_nvfp4_moe::cpu {

const Stages kPortable = StagesOf<PortableE2m1, PortableFp32>();

}  // namespace jax_nvfp4_moe::cpu
