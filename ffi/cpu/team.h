// Tasks in stages, shared by the calling thread and whatever threads of a pool come to help.

#ifndef JAX_NVFP4_MOE_CPU_TEAM_H_
#define JAX_NVFP4_MOE_CPU_TEAM_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace jax_nvfp4_moe::cpu {

struct Stage {
  int64_t tasks;
  std::function<void(int64_t task, void* scratch)> run;
};

using Schedule = std::function<void(std::function<void()>)>;

// Runs all stages, each after all tasks of those before, and returns when every task has ended.
//
// `helpers` times a function is given to `schedule`, which may run it on another thread at any
// time, later than this returns too: nothing waits for a helper that has not begun, so a pool whose
// threads are all busy, or all here, holds nothing up. Each thread has `kScratchBytes` of scratch.
//
// Rethrows what a task threw, after the other tasks.
void RunStages(std::vector<Stage> stages, int64_t helpers, const Schedule& schedule);

}  // namespace jax_nvfp4_moe::cpu

#endif  // JAX_NVFP4_MOE_CPU_TEAM_H_
