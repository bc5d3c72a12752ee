// One parallel job per layer call.
//
// A job is a fixed sequence of phases, each a fixed number of tasks. Whoever participates claims
// tasks from the phase's counter and, when none are left, waits until those still running are done.
// The caller starts at once; helpers are asked for, join whenever they arrive, and are never waited
// for: a pool that is busy, or that runs a helper inline, or much too late, costs speed and nothing
// else. What a task computes must not depend on who runs it.
#ifndef JAXMOE_CSRC_CPU_THREADS_H_
#define JAXMOE_CSRC_CPU_THREADS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace jaxmoe::cpu {

// Where helpers come from. Null in place of an executor means: no helpers.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int num_threads() const = 0;
  virtual void schedule(std::function<void()> task) = 0;
};

// A participant's private memory: 64-byte aligned buffers that grow on demand and are never
// initialised.
class Scratch {
 public:
  enum Slot { kInput, kPointers, kWide, kProduct, kWeights, kOutput, kOnes, kNumSlots };

  template <class T>
  T* get(Slot slot, int64_t count) {
    return static_cast<T*>(reserve(slot, static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(void* pointer) const;
  };
  void* reserve(Slot slot, size_t bytes);

  std::unique_ptr<void, Free> memory_[kNumSlots];
  size_t capacity_[kNumSlots] = {};
};

class Job {
 public:
  // `tasks[p]` is the number of tasks of phase p.
  explicit Job(std::vector<int64_t> tasks);
  virtual ~Job() = default;

  // Called by each participant around its tasks, on its own thread.
  virtual void enter() const {}
  virtual void leave() const {}
  virtual void run(int phase, int64_t task, Scratch& scratch) = 0;

 private:
  friend bool execute(const std::shared_ptr<Job>& job, Executor* executor, int max_threads);

  // Own cache lines: `next` is written by everyone.
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
    int64_t tasks = 0;
  };
  void participate(bool is_caller);

  std::unique_ptr<Phase[]> phases_;
  int num_phases_;
  std::atomic<bool> out_of_memory_{false};
};

// Runs all phases with at most `max_threads` participants; returns when the last task is done.
// False if a participant could not get its scratch memory (the outputs are then undefined).
bool execute(const std::shared_ptr<Job>& job, Executor* executor, int max_threads);

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_THREADS_H_
