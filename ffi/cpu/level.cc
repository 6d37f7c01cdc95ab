#include "level.h"

namespace jax_nvfp4_moe::cpu {
namespace {

bool Always() { return true; }

#if defined(__x86_64__)
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

}  // namespace

const Level* Levels() {
  static const Level levels[] = {
#if defined(__x86_64__)
      {"avx2", &kAvx2, HasAvx2},
#endif
      {"portable", &kPortable, Always},
      {},
  };
  return levels;
}

const Level* Find(const std::string& name) {
  for (const Level* level = Levels(); level->name != nullptr; ++level) {
    if (name.empty() ? level->supported() : name == level->name) return level;
  }
  return nullptr;
}

}  // namespace jax_nvfp4_moe::cpu
