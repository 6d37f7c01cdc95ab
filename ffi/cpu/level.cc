#include "level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jax_nvfp4_moe::cpu {
namespace {

bool Always() { return true; }

#if defined(__x86_64__)
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool HasAvx512Vnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }

bool HasAvx512Bf16() { return HasAvx512Vnni() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives a process the registers of tiles when it asks for them.
bool HasAmx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  static const bool has = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, asm/fpu/types.h
    unsigned a = 0, b = 0, c = 0, d = 0;
    return HasAvx512Bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 &&
           (d & kTile) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}
#endif

}  // namespace

const Level* Levels() {
  static const Level levels[] = {
#if defined(__x86_64__)
      {"amx", &kAmx, HasAmx},
      {"avx512_bf16", &kAvx512Bf16, HasAvx512Bf16},
      {"avx512_vnni", &kAvx512Vnni, HasAvx512Vnni},
      {"avx512", &kAvx512, HasAvx512},
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
