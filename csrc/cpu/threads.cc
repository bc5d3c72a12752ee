#include "cpu/threads.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jaxmoe::cpu {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Callers arrive with whatever floating-point mode their thread has (XLA's pool flushes denormals,
// Python's threads do not). One mode for every participant, so that the bits of a result never
// depend on who computed it.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kRoundNearestMaskedFtzDaz); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kRoundNearestMaskedFtzDaz = 0x9fc0;
  unsigned saved_;
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(kRoundNearestFz));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  static constexpr uint64_t kRoundNearestFz = uint64_t{1} << 24;
  uint64_t saved_ = 0;
#endif
};

void wait_until(const std::atomic<int64_t>& counter, int64_t value) {
  if (counter.load(std::memory_order_acquire) == value) return;
  const auto start = std::chrono::steady_clock::now();
  bool spinning = true;
  while (counter.load(std::memory_order_acquire) != value) {
    if (spinning) {
      for (int i = 0; i < 16; ++i) pause();
      spinning = std::chrono::steady_clock::now() - start < kSpinTime;
    } else {
      sched_yield();
    }
  }
}

}  // namespace

void Scratch::Free::operator()(void* pointer) const { std::free(pointer); }

void* Scratch::reserve(Slot slot, size_t bytes) {
  if (bytes > capacity_[slot]) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    memory_[slot].reset();
    memory_[slot].reset(std::aligned_alloc(64, rounded));
    if (!memory_[slot]) throw std::bad_alloc();
    capacity_[slot] = rounded;
  }
  return memory_[slot].get();
}

Job::Job(std::vector<int64_t> tasks)
    : phases_(new Phase[tasks.size()]), num_phases_(static_cast<int>(tasks.size())) {
  for (int p = 0; p < num_phases_; ++p) phases_[p].tasks = tasks[p];
}

void Job::participate(bool is_caller) {
  const FloatMode mode;
  Scratch scratch;
  bool entered = false;
  for (int p = 0; p < num_phases_; ++p) {
    Phase& phase = phases_[p];
    for (;;) {
      const int64_t task = phase.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= phase.tasks) break;
      if (!entered) enter();
      entered = true;
      try {
        run(p, task, scratch);
      } catch (const std::bad_alloc&) {
        out_of_memory_.store(true, std::memory_order_relaxed);
      }
      // Releases the task's results; whoever sees the full count acquires those of all tasks.
      phase.done.fetch_add(1, std::memory_order_acq_rel);
    }
    // After the last phase only the caller, who owns the buffers, has something to wait for.
    if (is_caller || p + 1 < num_phases_) wait_until(phase.done, phase.tasks);
  }
  if (entered) leave();
}

bool execute(const std::shared_ptr<Job>& job, Executor* executor, int max_threads) {
  const int helpers = executor ? std::min(max_threads, executor->num_threads()) - 1 : 0;
  for (int i = 0; i < helpers; ++i) {
    executor->schedule([job] { job->participate(/*is_caller=*/false); });
  }
  job->participate(/*is_caller=*/true);
  return !job->out_of_memory_.load(std::memory_order_relaxed);
}

}  // namespace jaxmoe::cpu
