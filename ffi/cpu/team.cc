#include "team.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#include "layer.h"

namespace jax_nvfp4_moe::cpu {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// This thread's, kept for its next call.
void* ThreadScratch() {
  thread_local std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, kScratchBytes));
  if (scratch == nullptr) throw std::bad_alloc();
  return scratch.get();
}

// A short wait for another thread, which may have lost its core.
class Waiting {
 public:
  void operator()() {
    if (++rounds_ < 2000) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }

 private:
  int rounds_ = 0;
};

class Team {
 public:
  explicit Team(std::vector<Stage> stages) : stages_(std::move(stages)) {
    for (const Stage& stage : stages_) {
      before_.push_back(total_);
      total_ += stage.tasks;
    }
  }

  // Takes tasks, in order, until there are none.
  void Work() {
    void* scratch = nullptr;
    size_t stage = 0;
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= total_) return;
      while (task >= before_[stage] + stages_[stage].tasks) ++stage;
      WaitFor(before_[stage]);
      try {
        if (scratch == nullptr) scratch = ThreadScratch();
        stages_[stage].run(task - before_[stage], scratch);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (error_ == nullptr) error_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void Finish() {
    WaitFor(total_);
    std::lock_guard lock(mutex_);
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  // Waits for the first `tasks` tasks. Other threads are running them: no thread takes a task of a
  // later stage before all of these are taken.
  void WaitFor(int64_t tasks) {
    Waiting wait;
    while (done_.load(std::memory_order_acquire) < tasks) wait();
  }

  std::vector<Stage> stages_;
  std::vector<int64_t> before_;  // tasks of the stages before each
  int64_t total_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace

void RunStages(std::vector<Stage> stages, int64_t helpers, const Schedule& schedule) {
  // Shared: a helper may begin when all is done.
  auto team = std::make_shared<Team>(std::move(stages));
  for (int64_t i = 0; i < helpers; ++i) schedule([team] { team->Work(); });
  team->Work();
  team->Finish();
}

}  // namespace jax_nvfp4_moe::cpu
