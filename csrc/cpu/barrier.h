// A barrier for a few threads that meet every few microseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace fastvq::cpu {

class Barrier {
   public:
    explicit Barrier(int64_t threads)
        : threads_(threads), spins_(threads <= static_cast<int64_t>(std::thread::hardware_concurrency()) ? 4000 : 200) {}

    // What a thread wrote before is seen by all threads after.
    void wait() {
        if (threads_ == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        // Spinning is fastest while every thread has a core of its own (to yield costs as much as a meeting); otherwise
        // the missing one needs ours, and soon: threads meet so often that what each meeting wastes is what the time
        // goes into.
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < spins_) {
                pause();
            } else {
                std::this_thread::yield();
            }
        }
    }

   private:
    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }

    const int64_t threads_;
    const int spins_;
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace fastvq::cpu
